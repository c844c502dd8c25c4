"""Uses a trained model on one device: features, matching and codewords of images and texts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Float32, Int32
from ml_collections import ConfigDict

from codebook_jax.data.text import Tokenizer, has_words, open_tokenizer
from codebook_jax.errors import UserError, reason
from codebook_jax.evaluation.zero_shot import label_features
from codebook_jax.files import parse_json
from codebook_jax.method.numerics import key_of, own_settings, unit
from codebook_jax.models import codis
from codebook_jax.models.explaining import Relevance, explain_pairs, layer_of
from codebook_jax.models.finetuned import Network
from codebook_jax.parallel import devices, sharding
from codebook_jax.run import checkpoint
from codebook_jax.run import record as records
from codebook_jax.weights import explained, layouts
from codebook_jax.weights.explained import Explanation, Grounded
from codebook_jax.weights.fill import fill
from codebook_jax.weights.finetuned import FINETUNED, Finetuned, Labelled
from codebook_jax.weights.inputs import Picture, Pictures, Texts, picture_list, pixels_of, text_list
from codebook_jax.weights.layouts import PRETRAINED
from codebook_jax.weights.loaded import Loaded, Tokenised, chunks

FOLDER = "export"  # in a workdir
MANIFEST = "export.json"
FORMAT = 1  # increase it when an older `load` cannot read what `export` writes
MEANS = 2  # has `model.pool` "mean", which a `load` of format 1 alone would take for "cls"
LOADED = (*PRETRAINED, "sequences", *FINETUNED)  # the values of config.task that can be loaded


class Codes(NamedTuple):
    """The most probable codewords of each feature, most probable first."""

    indices: Int32[np.ndarray, "features top_k"]
    probabilities: Float32[np.ndarray, "features top_k"]  # over all codewords they sum to 1


class Codis(Loaded):
    """A model of pre-training, which compares images and texts.

    Inputs are those of `Loaded`.
    """

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, items: dict[str, Any], step: int
    ) -> None:
        """Takes the parameters of the student and, to encode with it, of the teacher."""
        super().__init__(config, tokenizer, items, step)
        self._model = codis.Model(config, tokenizer.vocabulary.size)
        self._match = jax.jit(own_settings(self._match_probability))
        self._explain = jax.jit(own_settings(self._relevance))
        self._encoder = "teacher" if "teacher" in self._items else "student"
        self._student = self._items["student"]
        self._towers = self._items.get("teacher", self._student["towers"])
        none = {"codes": jnp.zeros((0, config.model.dim), jnp.float32)}
        self.codewords: Float32[np.ndarray, "codes dim"] = np.asarray(
            unit(self._student.get("codebook", none)["codes"])
        )

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
        """Unit features: a dot product with those of texts or images is the cosine similarity."""
        return self._joined(self._image_chunks(self._towers, picture_list(images)))

    def encode_text(self, texts: Texts) -> Float32[np.ndarray, "texts dim"]:
        """Unit features, in the same space as those of images."""
        return self._joined(self._text_chunks(self._towers, self._tokenised(text_list(texts))))

    def match(self, images: Pictures, texts: Texts) -> Float32[np.ndarray, " pairs"]:
        """Probability that image i and text i belong together, by the student's fusion encoder.

        A single image is paired with every text, a single text with every image. It is more
        accurate and slower than features: find candidates with features, and order them with it.
        """
        self._require_fusion("match with")
        pictures, texts = picture_list(images), text_list(texts)
        if len(pictures) != len(texts) and 1 not in (len(pictures), len(texts)):
            raise UserError(
                f"{len(pictures)} images and {len(texts)} texts cannot be paired: give as many "
                "images as texts, or one of either"
            )
        if not pictures or not texts:
            return np.zeros(0, np.float32)
        tokenised = self._tokenised(texts)
        image_chunks = self._image_chunks(self._student["towers"], pictures)
        text_chunks = self._text_chunks(self._student["towers"], tokenised)
        if len(pictures) == 1:
            image_chunks = itertools.repeat(next(image_chunks))
        elif len(texts) == 1:
            text_chunks = itertools.repeat(next(text_chunks))
        parts = []
        for (_, image_tokens, images), (_, states, lengths, count) in zip(
            image_chunks, text_chunks, strict=False
        ):
            if len(pictures) == 1:  # its keys and values are projected once for a chunk of texts
                pairs = states[None], lengths[None]
            else:
                rows = len(image_tokens)
                states = jnp.broadcast_to(states, (rows, *states.shape[1:]))
                pairs = states[:, None], np.broadcast_to(lengths, rows)[:, None]
            found = np.asarray(self._match(self._student, image_tokens, *pairs))
            parts.append(found.reshape(-1)[: max(images, count)])
        return np.concatenate(parts)

    def classify(self, images: Pictures, labels: Texts, prompts: Texts | None = None) -> Labelled:
        """The probability of each label for every image, without training for them: the softmax of
        the cosine similarities to the labels' prompts over the model's temperature (Radford et al.
        2021, 3.1). In `prompts` (None: those of the run) "{}" stands for the label.
        """
        labels = text_list(labels)
        prompts = self.config.evaluation.prompts if prompts is None else text_list(prompts)
        if not labels:
            raise UserError("labels is empty: give at least one")
        for label in labels:
            if not has_words(label):
                raise UserError(f"the label {label!r} has no words: leave it out")
        told = label_features(self.encode_text, labels, prompts)
        temperature = float(self._student["temperature"])
        features = self.encode_image(images)
        return Labelled(tuple(labels), code_probabilities(features, told, temperature=temperature))

    def explain(self, image: Picture, text: str) -> Explanation:
        """Which patches of an image speak for its match with a text, word by word.

        Grad-CAM of the matching probability in one layer of the fusion encoder: the third of six,
        the one in the middle of fewer.
        """
        if self.config.model.text.fusion_depth == 1:
            raise UserError(
                "this model has a single fusion layer, which matches by what [CLS] sees: its words "
                "have no maps; ground finds what the whole text names"
            )
        return self._explained(image, text)

    def ground(
        self, image: Picture, text: str, proposals: Sequence[Sequence[float]] | None = None
    ) -> Grounded:
        """Where an image shows what a text names: the highest point of the map that `explain` makes
        of the whole text, and which of the `proposals`, boxes [x, y, width, height] in pixels of
        the image, holds most of it (Li et al. 2021, 4.5).
        """
        return explained.ground(self._explained(image, text), text, proposals)

    def codes(
        self, *, images: Pictures | None = None, texts: Texts | None = None, top_k: int = 1
    ) -> Codes:
        """The `top_k` most probable codewords of images or texts; `codewords[index]` is one."""
        if (images is None) == (texts is None):
            raise UserError(
                "codes takes either images=... or texts=..., not both: call it once for each"
            )
        if not len(self.codewords):
            raise UserError(
                "this model has no codebook: use the features of encode_image and encode_text"
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

    def _match_probability(
        self, student: Any, image_tokens: Array, states: Array, lengths: Array
    ) -> Float32[Array, "rows texts"]:
        logits = self._model.pair_logits(student, image_tokens, states, lengths)
        return jax.nn.softmax(logits, axis=-1)[..., codis.MATCH]

    def _explained(self, image: Picture, text: str) -> Explanation:
        self._require_fusion("explain with")
        pictures, texts = picture_list(image), text_list(text)
        if len(pictures) != 1 or len(texts) != 1:
            raise UserError(
                f"{len(pictures)} images and {len(texts)} texts were given: give one image and one "
                "text"
            )
        pixels = pixels_of(pictures[0], 0)
        tokens, lengths = self._tokenised(texts)
        ((seen, _),) = self._pixel_chunks([pixels])
        maps, logits = jax.tree.map(np.asarray, self._explain(self._student, seen, tokens, lengths))
        side = round(maps.shape[-1] ** 0.5)
        maps = maps.reshape(-1, side, side)
        words = self._tokenizer.words(texts[0], self.config.model.text.max_tokens)
        return Explanation(
            words=tuple(word for word, _ in words),
            maps=np.stack([maps[places].sum(axis=0) for _, places in words]),
            whole=maps.sum(axis=0),
            layer=layer_of(self.config.model.text.fusion_depth),
            probability=float(jax.nn.softmax(logits[0])[codis.MATCH]),
            pixels=pixels,
        )

    def _relevance(self, student: Any, images: Array, tokens: Array, lengths: Array) -> Relevance:
        return explain_pairs(self._model, student, images, tokens, lengths)

    def _require_fusion(self, to: str) -> None:
        if not self.config.model.text.fusion_depth:
            raise UserError(
                f"this model has no fusion encoder to {to}: compare the features of encode_image "
                "and encode_text"
            )

    # -- outputs for inputs padded to a bucket, and how many rows are not padding

    def _joined(self, chunks: Iterator[tuple]) -> Float32[np.ndarray, "rows dim"]:
        parts = [np.asarray(features)[:count] for features, *_, count in chunks]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def _image_chunks(
        self, towers: Any, pictures: list[Picture]
    ) -> Iterator[tuple[Array, Array, int]]:
        """Features and tokens of images."""
        for pixels, count in self._pixel_chunks(pictures):
            yield *self._model.encode_images(towers, pixels), count

    def _text_chunks(
        self, towers: Any, texts: Tokenised
    ) -> Iterator[tuple[Array, Array, Int32[np.ndarray, " rows"], int]]:
        """Features, states and lengths of texts."""
        tokens, lengths = texts
        for rows, count in chunks(len(tokens)):
            found = self._model.encode_texts(towers, tokens[rows], lengths[rows])
            yield *found, lengths[rows], count


def load(path: str | os.PathLike, *, teacher: bool = False) -> Codis | Finetuned:
    """The model of an export folder, or of a workdir that has one; see `codebook_jax.load`."""
    devices.check_platforms()
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"load({path!r}): give the path of an export")
    given = Path(os.path.expanduser(path)).absolute()
    folder = given if os.path.isfile(given / MANIFEST) else given / FOLDER
    if not os.path.isfile(folder / MANIFEST):  # also if the name is too long
        command = f"python -m codebook_jax.main --workdir={given} --mode=export"
        of_run = f", or make the run's with {command}" if os.path.isdir(given) else ""
        raise UserError(f"{given} is not a folder with an {MANIFEST}: give an export{of_run}")
    with reading(folder / MANIFEST):
        manifest = parse_json((folder / MANIFEST).read_bytes())
        number, items, step = (manifest[field] for field in ("format", "items", "step"))
        task = manifest.get("task", LOADED[0])
    if task == "text_assignment":
        raise UserError(
            f"{folder} is of config.task={task!r}, the stage before NLVR2, which answers nothing: "
            "start NLVR2 from it, with --config=configs/finetune_nlvr2.py "
            f"--config.init=model:{folder}, and load the export of that run"
        )
    if number not in (FORMAT, MEANS) or task not in LOADED:
        raise UserError(
            f"{folder} is an export of format {number} and task={task!r}, but this codebook_jax "
            f"loads formats {FORMAT} and {MEANS} of {', '.join(LOADED)}: install the version it "
            "was written with, or read its arrays with orbax.checkpoint's "
            "StandardCheckpointer().restore"
        )
    if teacher and task in FINETUNED:
        raise UserError(f"{folder} is a fine-tuned model, which has no teacher: leave it out")
    if teacher and "teacher" not in items:
        raise UserError(
            f"{folder} has no teacher: export again with --config.export.teacher=true, or load "
            "without teacher=True"
        )
    config = config_of(folder)
    tokenizer, _ = open_tokenizer("", folder, None, 0)
    with reading(folder / records.RECORD):
        with config.unlocked():
            config.model.attention, config.model.remat = "auto", "none"
        words = tokenizer.vocabulary.size
        student_of = functools.partial(codis.init_student, config, words)
        if task in FINETUNED:
            student_of = Network(config, words).init
        student = jax.eval_shape(own_settings(student_of), key_of(0))
    expected = {"student": student} | ({"teacher": student["towers"]} if teacher else {})
    shapes = {name: leaf.shape for name, leaf in sharding.named(expected)}
    stored = read_items(folder, expected)
    options = dict(text_depth=config.model.text.depth, what=str(folder), allow_partial=False)
    arrays = fill(layouts.OWN, stored, shapes, **options).arrays
    return FINETUNED.get(task, Codis)(
        config, tokenizer, traverse_util.unflatten_dict(arrays, sep="/"), step
    )


def code_probabilities(
    features: Float[np.ndarray, "features dim"],
    codewords: Float[np.ndarray, "codes dim"],
    *,
    temperature: float,
) -> Float32[np.ndarray, "features codes"]:
    """Softmax of z C / `temperature` over codewords, all of unit length (Duan et al., 3.1)."""
    logits = features.astype(np.float32) @ codewords.T.astype(np.float32) / np.float32(temperature)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


# -- reading the folder


def config_of(folder: Path) -> ConfigDict:
    """The config of a run or export."""
    with reading(folder / records.RECORD):
        record = records.read_record(folder)
        if record is None:
            raise FileNotFoundError("it is missing")
        return records.recorded_config(record)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a UserError."""
    try:
        yield
    except Exception as failure:
        why = reason(failure.__cause__ or failure)
        advice = "export again, or give another folder"
        raise UserError(f"{path} cannot be read ({why}): {advice}") from failure


def read_items(folder: Path, items: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of these items of an export or checkpoint, by the names of a train state."""
    arrays = {}
    for item in items:
        with reading(folder / item):
            found = checkpoint.read_arrays(folder / item)
        arrays |= {f"{item}/{name}": array for name, array in found.items()}
    return arrays
