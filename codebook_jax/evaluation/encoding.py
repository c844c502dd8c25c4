"""Images and captions of a source as features and tokens on the host, in chunks of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Record, Source
from codebook_jax.data.text import UNREAD, Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, out of how many


class Features(NamedTuple):
    """One pair of towers' outputs for a gallery: unit features, and their tokens for matching."""

    image: Float[np.ndarray, "images dim"]
    text: Float[np.ndarray, "texts dim"]
    image_tokens: Float[np.ndarray, "images patches width"] | None
    text_states: Float[np.ndarray, "texts tokens width"] | None


class Gallery(NamedTuple):
    """The images that could be read, all their captions, and each tower's outputs for them."""

    image_ids: Int[np.ndarray, "images"]
    text_image_ids: Int[np.ndarray, "texts"]
    text_lengths: Int[np.ndarray, "texts"]
    captions: list[str]
    positions: Int[np.ndarray, "images"]  # of each image in the source
    features: dict[str, Features]  # by the name of the towers
    left_out: int  # images that could not be read
    truncated: int  # captions longer than the model reads


class Encoders(Protocol):
    """Programs that run towers, given as parameters, on rows split over a mesh."""

    mesh: jax.sharding.Mesh

    def encode_images(
        self, towers: Any, images: UInt8[Array, "rows side side 3"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows patches width"]]:
        """Unit features of images, and their tokens."""

    def encode_texts(
        self, towers: Any, tokens: Int[Array, "rows tokens"], lengths: Int[Array, "rows"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows tokens width"]]:
        """Unit features of texts, and the states of their tokens."""


class GallerySpec(NamedTuple):
    """How much of a source is read, and in which shapes."""

    images: int  # the first of the source; 0: all
    rows: int  # per call of an encoder, a multiple of the mesh's data shards
    size_px: int
    max_tokens: int
    threads: int

    @classmethod
    def from_config(
        cls, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, images: int
    ) -> GallerySpec:
        """The shapes of a config, for `images` images."""
        rows = rows_over_shards(min(config.evaluation.batch, images), mesh)
        model = config.model
        return cls(images, rows, model.image.size_px, model.text.max_tokens, config.data.threads)


def encode_source(
    encoders: Encoders,
    towers: Mapping[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    spec: GallerySpec,
    *,
    with_tokens: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> Gallery:
    """The first images of a source and all their captions, through each of the `towers`.

    `with_tokens` names the towers whose tokens are kept too. Images that cannot be read are left
    out with their captions and reported. Raises UserError if none can be read or a feature is not
    finite.
    """
    mesh, rows = encoders.mesh, spec.rows
    count = min(spec.images, len(source)) if spec.images else len(source)
    kept: list[tuple[int, Record]] = []
    tables = {name: (_Table(count), _Table(count)) for name in towers}
    unreadable: list[str] = []
    for chunk in _read(source, tokenizer, count, spec):
        readable = [(at, record, image) for at, record, image in chunk if record is not None]
        unreadable += [image for _, record, image in chunk if record is None]
        kept += [(at, record) for at, record, _ in readable]
        if readable:
            pixels = np.stack([image for _, _, image in readable])
            for name, weights in towers.items():
                found = encoders.encode_images(weights, _padded(pixels, rows, mesh))
                for table, part in zip(tables[name], found, strict=True):
                    if table is tables[name][0] or name in with_tokens:
                        table.add(part, len(pixels))
        if progress is not None:
            progress("images", chunk[-1][0] + 1, count)
    _report_unreadable(source, unreadable, count)
    records = [record for _, record in kept]
    captions = [caption for record in records for caption in record.captions]
    tokens, lengths, truncated = tokenizer.encode(captions, spec.max_tokens)
    if truncated:
        say(
            f"{truncated:,} of {len(captions):,} captions are longer than {spec.max_tokens} "
            "tokens: their ends are cut off"
        )
    features = {}
    for name, weights in towers.items():
        image, image_tokens = (table.filled for table in tables[name])
        keep = name in with_tokens
        found = _encode_texts(encoders, weights, tokens, lengths, rows, keep, progress)
        features[name] = Features(image, found[0], image_tokens, found[1])
        _check_finite(name, features[name])
    return Gallery(
        np.array([record.image_id for record in records]),
        np.array([record.image_id for record in records for _ in record.captions]),
        lengths,
        captions,
        np.array([at for at, _ in kept]),
        features,
        len(unreadable),
        truncated,
    )


def _encode_texts(
    encoders: Encoders,
    towers: Any,
    tokens: Int[np.ndarray, "texts tokens"],
    lengths: Int[np.ndarray, "texts"],
    rows: int,
    keep_states: bool,
    progress: Progress | None,
) -> tuple[Float[np.ndarray, "texts dim"], Float[np.ndarray, "texts tokens width"] | None]:
    text, states = _Table(len(tokens)), _Table(len(tokens))
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        padded = (_padded(array[part], rows, encoders.mesh) for array in (tokens, lengths))
        found = encoders.encode_texts(towers, *padded)
        text.add(found[0], len(tokens[part]))
        if keep_states:
            states.add(found[1], len(tokens[part]))
        if progress is not None:
            progress("texts", min(start + rows, len(tokens)), len(tokens))
    return text.filled, states.filled


def rows_over_shards(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows` rounded up to a multiple of the parts that the batch is split into."""
    shards = sharding.data_shards(mesh)
    return -(-rows // shards) * shards


class _Table:
    """Rows gathered on the host in an array that is allocated once."""

    def __init__(self, rows: int) -> None:
        self._rows, self._used = rows, 0
        self._array: np.ndarray | None = None

    def add(self, part: Array, count: int) -> None:
        """Adds the first `count` rows; the others were padding."""
        rows = sharding.to_host(part)[:count]
        if self._array is None:
            self._array = np.empty((self._rows, *rows.shape[1:]), rows.dtype)
        self._array[self._used : self._used + count] = rows
        self._used += count

    @property
    def filled(self) -> np.ndarray | None:
        return None if self._array is None else self._array[: self._used]


def _padded(array: np.ndarray, rows: int, mesh: jax.sharding.Mesh) -> Array:
    """On the device, with the last row repeated up to `rows`: a valid input, unlike zeros."""
    missing = rows - len(array)
    if missing:
        array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return sharding.to_device(array, mesh)


def _read(
    source: Source, tokenizer: Tokenizer, count: int, spec: GallerySpec
) -> Iterator[Sequence[tuple[int, Record | None, Any]]]:
    """Chunks of (position, record, image), or (position, None, why) if unreadable.

    Reads one chunk ahead.
    """

    def read(position: int) -> tuple[int, Record | None, Any]:
        try:
            record = source[position]
            captions = tuple(tokenizer.readable(record.captions))
            if not captions:
                raise UnreadableImage(f"{source.name(position)} {UNREAD}")
            record = record._replace(captions=captions)
            return position, record, resize_square(decode(record.image), spec.size_px)
        except UnreadableImage as error:
            return position, None, str(error)

    with ThreadPoolExecutor(max(1, spec.threads)) as pool:
        rows = spec.rows
        chunks = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
        ahead = [pool.submit(read, position) for position in chunks[0]] if chunks else []
        for upcoming in [*chunks[1:], range(0)]:
            running, ahead = ahead, [pool.submit(read, position) for position in upcoming]
            yield [job.result() for job in running]


def _report_unreadable(source: Source, unreadable: Sequence[str], count: int) -> None:
    if len(unreadable) == count:
        why = f" (first: {unreadable[0]})" if unreadable else ""
        raise UserError(f"{source!r} has no image to evaluate: 0 of {count:,} could be read{why}")
    if unreadable:
        say(
            f"{len(unreadable):,} of {count:,} images could not be read and are left out with "
            f"their captions (first: {unreadable[0]})"
        )


def _check_finite(name: str, features: Features) -> None:
    for kind, array in (("images", features.image), ("texts", features.text)):
        bad = int((~np.isfinite(array).all(axis=1)).sum())
        if bad:
            raise UserError(
                f"the {name}'s features of {bad:,} of {len(array):,} {kind} are not finite and "
                "cannot be ranked: the weights are broken, use an earlier checkpoint"
            )
