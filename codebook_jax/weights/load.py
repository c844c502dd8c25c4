"""Uses a trained model: features, matching and codewords of your images and texts, on one device of
any kind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from codebook_jax.data import augment
from codebook_jax.data.images import resize_square
from codebook_jax.data.text import Tokenizer, Vocabulary, few_words, has_words, tokenizer_for_run
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json
from codebook_jax.method.numerics import key_of, own_settings
from codebook_jax.models import codis
from codebook_jax.models.heads import MATCH
from codebook_jax.parallel import devices
from codebook_jax.run import record as records
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.weights.given import Picture, Pictures, Texts, as_pictures, as_texts, pixels_of

FOLDER = "export"  # in a workdir
MANIFEST = "export.json"
FORMAT = 1  # increase it when an older `load` cannot read what `export` writes
BUCKETS = (
    1,
    4,
    16,
    64,
)  # a call is padded to one of these numbers of rows; one compiled program each
READERS = min(8, os.cpu_count() or 1)  # threads that decode images


class Codes(NamedTuple):
    """The most probable codewords of each feature, most probable first."""

    indices: Int32[np.ndarray, "features top_k"]
    probabilities: Float32[np.ndarray, "features top_k"]  # over all codewords they sum to 1


class Codis:
    """A loaded model, which can be used from several threads.

    Images are one or several (a list, a generator, an array) of file paths, open binary files,
    contents of files (bytes), PIL images, or uint8 arrays [height, width, 3] or [height, width].
    They are read as in evaluation: upright, on white, the whole picture resized to the model's
    square. Arrays that are not uint8 are refused, since their range is unknown. Texts are one
    string or a list of strings. Texts longer than the model reads are truncated, with a warning;
    words unknown to the tokenizer also give a warning. An unreadable input raises UserError, which
    names its position.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        tokenizer: Tokenizer,
        student: dict[str, Any],
        teacher_towers: dict[str, Any] | None,
        step: int,
    ) -> None:
        self.config, self.step = config, step
        self._tokenizer = tokenizer
        self._model = codis.build_model(config, tokenizer.vocabulary.size)
        self._student = jax.device_put(student)
        self._towers = (
            self._student["towers"] if teacher_towers is None else jax.device_put(teacher_towers)
        )
        self._embed_images = jax.jit(own_settings(self._image_features))
        self._embed_texts = jax.jit(own_settings(self._text_features))
        self._match = jax.jit(own_settings(self._match_probability))
        self._encoder = "student" if teacher_towers is None else "teacher"
        self.codewords: Float32[np.ndarray, "codes dim"] = np.asarray(
            codis.unit(self._student["codebook"]["codes"])
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """The number of tokens, and the ids of the special ones."""
        return self._tokenizer.vocabulary

    @property
    def dim(self) -> int:
        """The size of a feature."""
        return self.config.model.dim

    def __repr__(self) -> str:
        return (
            f"Codis(size {self.config.size}, step {self.step:,}, encodes with the {self._encoder}, "
            f"dim {self.dim}, {len(self.codewords):,} codewords)"
        )

    def encode_image(self, images: Pictures) -> Float32[np.ndarray, "images dim"]:
        """Unit features: their dot product with those of texts or other images is the cosine
        similarity.
        """
        parts = [
            np.asarray(self._embed_images(self._towers, pixels)[0])[:count]
            for pixels, count in self._pixel_chunks(as_pictures(images))
        ]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def encode_text(self, texts: Texts) -> Float32[np.ndarray, "texts dim"]:
        """Unit features, in the same space as those of images."""
        tokenised = self._tokenised(as_texts(texts))
        parts = [
            np.asarray(self._embed_texts(self._towers, tokens, lengths)[0])[:count]
            for tokens, lengths, count in _token_chunks(*tokenised)
        ]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def match(self, images: Pictures, texts: Texts) -> Float32[np.ndarray, "pairs"]:
        """Probability that image i and text i belong together, by the student's fusion encoder and
        matching head.

        A single image is paired with every text, a single text with every image; otherwise there
        must be as many images as texts. It reads each pair jointly, so it is more accurate and
        slower than features: find candidates with features, and order them with `match`.
        """
        pictures, texts = as_pictures(images), as_texts(texts)
        if len(pictures) != len(texts) and 1 not in (len(pictures), len(texts)):
            raise UserError(
                f"{len(pictures)} images and {len(texts)} texts cannot be paired: give as many "
                "images as texts, or one of either"
            )
        if not pictures or not texts:
            return np.zeros(0, np.float32)
        towers, tokenised = self._student["towers"], self._tokenised(texts)
        image_chunks = (
            (self._embed_images(towers, pixels)[1], count)
            for pixels, count in self._pixel_chunks(pictures)
        )
        text_chunks = (
            (self._embed_texts(towers, tokens, lengths)[1], lengths, count)
            for tokens, lengths, count in _token_chunks(*tokenised)
        )
        parts = []
        if (
            len(pictures) == 1
        ):  # then its keys and values are projected once for all texts of a chunk
            ((image_tokens, _),) = image_chunks
            for states, lengths, count in text_chunks:
                found = self._match(self._student, image_tokens, states[None], lengths[None])
                parts.append(np.asarray(found)[0, :count])
        elif len(texts) == 1:
            ((states, lengths, _),) = text_chunks
            for image_tokens, count in image_chunks:
                rows = len(image_tokens)
                same = (
                    jnp.repeat(states[None], rows, axis=0),
                    np.repeat(lengths[None], rows, axis=0),
                )
                parts.append(np.asarray(self._match(self._student, image_tokens, *same))[:count, 0])
        else:
            for (image_tokens, count), (states, lengths, _) in zip(
                image_chunks, text_chunks, strict=True
            ):
                pairs = states[:, None], lengths[:, None]
                parts.append(
                    np.asarray(self._match(self._student, image_tokens, *pairs))[:count, 0]
                )
        return np.concatenate(parts)

    def codes(
        self, *, images: Pictures | None = None, texts: Texts | None = None, top_k: int = 1
    ) -> Codes:
        """The `top_k` most probable codewords of images or texts: softmax of z C / gamma (Duan et
        al., 3.1).

        `gamma` is config.codebook.temperature; `codewords[index]` is the codeword.
        """
        if (images is None) == (texts is None):
            raise UserError(
                "codes takes either images=... or texts=..., not both: call it once for each"
            )
        if not isinstance(top_k, int | np.integer) or not 1 <= top_k <= len(self.codewords):
            raise UserError(
                f"top_k={top_k!r} is not a whole number between 1 and the {len(self.codewords):,} "
                "codewords"
            )
        features = self.encode_text(texts) if images is None else self.encode_image(images)
        probabilities = code_probabilities(
            features, self.codewords, temperature=self.config.codebook.temperature
        )
        indices = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return Codes(indices.astype(np.int32), np.take_along_axis(probabilities, indices, axis=1))

    # -- compiled programs

    def _image_features(self, towers: Any, pixels: Array) -> tuple[Array, Array]:
        normalised = augment.normalise(pixels, jnp.dtype(self.config.model.dtype))
        return self._model.towers(towers).embed_images(normalised)

    def _text_features(self, towers: Any, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return self._model.towers(towers).embed_texts(tokens, lengths)

    def _match_probability(
        self,
        student: Any,
        image_tokens: Float[Array, "rows patches width"],
        states: Float[Array, "rows texts tokens width"],
        lengths: Int[Array, "rows texts"],
    ) -> Float32[Array, "rows texts"]:
        fused = self._model.towers(student["towers"]).fusion(states, lengths, image_tokens)
        logits = self._model.match_logits(student["matching"], fused[:, :, 0])
        return jax.nn.softmax(logits, axis=-1)[..., MATCH]

    # -- their inputs

    def _pixel_chunks(
        self, pictures: list[Picture]
    ) -> Iterator[tuple[UInt8[np.ndarray, "rows side side 3"], int]]:
        """Pixels padded to a bucket, and how many rows are not padding.

        Only one chunk is in memory at a time.
        """
        side = self.config.model.image.size_px

        def read(position: int) -> np.ndarray:
            return resize_square(pixels_of(pictures[position], position), side)

        with ThreadPoolExecutor(READERS) as pool:
            for part, rows in _chunks(len(pictures)):
                yield _padded(np.stack(list(pool.map(read, part))), rows), len(part)

    def _tokenised(
        self, texts: list[str]
    ) -> tuple[Int32[np.ndarray, "texts tokens"], Int32[np.ndarray, "texts"]]:
        """Tokens and lengths; warns about truncated texts and unknown words."""
        most = self.config.model.text.max_tokens
        tokens, lengths, truncated = self._tokenizer.encode(texts, most)
        worded = np.array([has_words(text) for text in texts], bool)
        wordless = np.flatnonzero((lengths <= 2) | ~worded)  # [CLS] [SEP]
        if len(wordless):
            raise UserError(
                f"text {wordless[0]}, {texts[wordless[0]]!r}, has no words: leave it out"
            )
        if truncated:
            warnings.warn(
                f"{truncated:,} of {len(texts):,} texts are longer than the {most} tokens that "
                "this model reads: they are truncated",
                stacklevel=3,
            )
        if self._tokenizer.unknown(tokens, lengths).count:
            words = self._tokenizer.unknown_words(texts)
            warnings.warn(
                f"this model's tokenizer does not know {few_words(words)}: the model reads them "
                "all as the same unknown word",
                stacklevel=3,
            )
        return tokens, lengths


def _token_chunks(
    tokens: Int32[np.ndarray, "texts tokens"], lengths: Int32[np.ndarray, "texts"]
) -> Iterator[tuple[Int32[np.ndarray, "rows tokens"], Int32[np.ndarray, "rows"], int]]:
    """Tokens and lengths padded to a bucket, and how many rows are not padding."""
    for part, rows in _chunks(len(tokens)):
        own = slice(part.start, part.stop)
        yield _padded(tokens[own], rows), _padded(lengths[own], rows), len(part)


def load(path: str | os.PathLike, *, teacher: bool = False) -> Codis:
    """The model of an export folder, or of a workdir that has one; see `codebook_jax.load`."""
    devices.check_platforms()
    folder = _export_folder(Path(os.path.expanduser(path)).absolute())
    manifest = _manifest(folder)
    if teacher and "teacher" not in manifest["items"]:
        raise UserError(
            f"{folder} has no teacher: export again with --config.export.teacher=true, or load "
            "without teacher=True"
        )
    config = _config(folder)
    tokenizer = tokenizer_for_run("", folder, None, 0)
    try:
        student_of = own_settings(codis.init_student)
        expected = jax.eval_shape(lambda: student_of(config, tokenizer.vocabulary.size, key_of(0)))
    except Exception as failure:  # whatever damaged settings lead to
        raise _damaged(folder / records.RECORD, failure) from failure
    student = _restored(folder, "student", expected)
    teacher_towers = _restored(folder, "teacher", expected["towers"]) if teacher else None
    return Codis(config, tokenizer, student, teacher_towers, manifest["step"])


def code_probabilities(
    features: Float[np.ndarray, "features dim"],
    codewords: Float[np.ndarray, "codes dim"],
    *,
    temperature: float,
) -> Float32[np.ndarray, "features codes"]:
    """Softmax of z C / gamma over the codewords, for unit features and codewords."""
    logits = features.astype(np.float32) @ codewords.T.astype(np.float32) / np.float32(temperature)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


# -- reading the folder


def _export_folder(path: Path) -> Path:
    try:
        for folder in (path, path / FOLDER):
            if (folder / MANIFEST).is_file():
                return folder
    except OSError as failure:  # a name that is too long, a folder that may not be read
        raise UserError(
            f"{path} cannot be read ({failure.strerror}): give the folder that --mode=export wrote"
        ) from failure
    if not path.is_dir():
        what = "is a file, not the folder of an export" if path.exists() else "is not a folder here"
        raise UserError(f"{path} {what}: give the folder that --mode=export wrote")
    if (path / records.RECORD).is_file() and (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is a run without an export: make one with python -m codebook_jax.main "
            f"--workdir={path} --mode=export"
        )
    raise UserError(
        f"{path} has no {MANIFEST}, so it is not an export: give the folder that --mode=export "
        "wrote"
    )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        number, _, _ = manifest["format"], manifest["items"], manifest["step"]
    except (OSError, ValueError, TypeError, KeyError) as failure:
        raise _damaged(folder / MANIFEST, failure) from failure
    if number != FORMAT:
        raise UserError(
            f"{folder} is an export of format {number}, but this codebook_jax reads format "
            f"{FORMAT}: install the version it was written with, or export again"
        )
    return manifest


def _config(folder: Path) -> ml_collections.ConfigDict:
    """The run's config, adapted to one device of any kind."""
    try:
        record = records.read_record(folder)
        if record is None:
            raise FileNotFoundError("it is missing")
        config = records.recorded_config(record)
        with config.unlocked():
            config.model.attention, config.model.remat = "auto", "none"
    except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as failure:
        raise _damaged(folder / records.RECORD, failure.__cause__ or failure) from failure
    return config


def _restored(folder: Path, item: str, expected: Any) -> Any:
    """The arrays of one item as NumPy; raises UserError if they do not match the config."""
    try:
        arrays = read_arrays(folder / item)
    except Exception as failure:  # any error of Orbax or tensorstore for a broken file
        raise _damaged(folder / item, failure) from failure
    expected = traverse_util.flatten_dict(expected, sep="/")
    for name in sorted(arrays.keys() | expected.keys()):
        found, wanted = (
            f"{of[name].dtype}{list(of[name].shape)}" if name in of else "missing"
            for of in (arrays, expected)
        )
        if found != wanted:
            raise UserError(
                f"{folder / item} does not fit its {records.RECORD}: {name} is {found}, but should "
                f"be {wanted}: export again"
            )
    return traverse_util.unflatten_dict(arrays, sep="/")


def _damaged(path: Path, failure: Exception) -> UserError:
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    reason = reason if len(reason) <= 160 else f"{reason[:157]}..."
    return UserError(f"the export is damaged: {path} cannot be read ({reason}): export again")


# -- batches of few sizes


def _chunks(count: int) -> Iterator[tuple[range, int]]:
    """Ranges of at most the largest bucket, each with the bucket that holds it."""
    for start in range(0, count, BUCKETS[-1]):
        part = range(start, min(start + BUCKETS[-1], count))
        yield part, next(bucket for bucket in BUCKETS if bucket >= len(part))


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with its last row repeated up to `rows`: a valid input, which zeros are not."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])
