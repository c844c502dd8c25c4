"""Images and captions of a source as features and tokens on the host, in padded chunks of one
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

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


def encode_source(
    task: Any,
    towers: Mapping[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    *,
    images: int,
    rows: int,
    size_px: int,
    max_tokens: int,
    threads: int,
    with_tokens: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> Gallery:
    """The first `images` images of a source (0: all) and all their captions, through each of the
    `towers`.

    `with_tokens` names the towers whose tokens are kept too. Images that cannot be read are left
    out with their captions and reported. Raises UserError if none can be read or a feature is not
    finite.
    """
    count = min(images, len(source)) if images else len(source)
    kept: list[tuple[int, Record]] = []
    tables = {name: (_Table(count), _Table(count)) for name in towers}
    unreadable: list[str] = []
    for chunk in _read(source, tokenizer, count, rows, size_px, threads):
        readable = [(at, record, image) for at, record, image in chunk if record is not None]
        unreadable += [image for _, record, image in chunk if record is None]
        kept += [(at, record) for at, record, _ in readable]
        if readable:
            pixels = np.stack([image for _, _, image in readable])
            for name, weights in towers.items():
                features, tokens = encode_image_rows(task, weights, pixels, rows)
                tables[name][0].add(sharding.to_host(features)[: len(pixels)])
                if name in with_tokens:
                    tables[name][1].add(sharding.to_host(tokens)[: len(pixels)])
        if progress is not None:
            progress("images", chunk[-1][0] + 1, count)
    _say_unreadable(source, unreadable, count)
    records = [record for _, record in kept]
    captions = [caption for record in records for caption in record.captions]
    tokens, lengths, truncated = tokenizer.encode(captions, max_tokens)
    if truncated:
        say(
            f"{truncated:,} of {len(captions):,} captions are longer than {max_tokens} tokens: "
            "their ends are cut off"
        )
    features = {}
    for name, weights in towers.items():
        keep = name in with_tokens
        text, states = _encode_texts(task, weights, tokens, lengths, rows, keep, progress)
        features[name] = Features(
            tables[name][0].filled, text, tables[name][1].filled if keep else None, states
        )
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


def encode_image_rows(
    task: Any, towers: Any, images: UInt8[np.ndarray, "images side side 3"], rows: int
) -> tuple[jax.Array, jax.Array]:
    """Features and tokens of at most `rows` images, padded to exactly `rows`; ignore the rows past
    the images.
    """
    return task.encode_images(towers, sharding.to_device(padded(images, rows), task.mesh))


def encode_text_rows(
    task: Any,
    towers: Any,
    tokens: Int[np.ndarray, "texts tokens"],
    lengths: Int[np.ndarray, "texts"],
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    """Features and states of at most `rows` texts, padded to exactly `rows`; ignore the rows past
    the texts.
    """
    placed = (
        sharding.to_device(padded(tokens, rows), task.mesh),
        sharding.to_device(padded(lengths, rows), task.mesh),
    )
    return task.encode_texts(towers, *placed)


def rows_over_shards(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows` rounded up to a multiple of the parts that the batch is split into."""
    shards = sharding.data_shards(mesh)
    return -(-rows // shards) * shards


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with its last row repeated until there are `rows`: a valid input, unlike zeros."""
    if len(array) == rows:
        return array
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


class _Table:
    """Rows gathered on the host in an array that is allocated once."""

    def __init__(self, rows: int) -> None:
        self._rows, self._used = rows, 0
        self._array: np.ndarray | None = None

    def add(self, part: np.ndarray) -> None:
        if self._array is None:
            self._array = np.empty((self._rows, *part.shape[1:]), part.dtype)
        self._array[self._used : self._used + len(part)] = part
        self._used += len(part)

    @property
    def filled(self) -> np.ndarray:
        return self._array[: self._used]


def _encode_texts(
    task: Any,
    towers: Any,
    tokens: Int[np.ndarray, "texts tokens"],
    lengths: Int[np.ndarray, "texts"],
    rows: int,
    keep_states: bool,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    features, states = _Table(len(tokens)), _Table(len(tokens))
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        count = len(tokens[part])
        feature_rows, state_rows = encode_text_rows(task, towers, tokens[part], lengths[part], rows)
        features.add(sharding.to_host(feature_rows)[:count])
        if keep_states:
            states.add(sharding.to_host(state_rows)[:count])
        if progress is not None:
            progress("texts", start + count, len(tokens))
    return features.filled, states.filled if keep_states else None


def _read(
    source: Source, tokenizer: Tokenizer, count: int, rows: int, size_px: int, threads: int
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
            return position, record, resize_square(decode(record.image), size_px)
        except UnreadableImage as error:
            return position, None, str(error)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        chunks = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
        ahead = [pool.submit(read, position) for position in chunks[0]] if chunks else []
        for upcoming in [*chunks[1:], range(0)]:
            reading, ahead = ahead, [pool.submit(read, position) for position in upcoming]
            yield [job.result() for job in reading]


def _say_unreadable(source: Source, unreadable: Sequence[str], count: int) -> None:
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
