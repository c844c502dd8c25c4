"""Images and captions of a source as features and tokens on the host, in chunks of one shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Record, Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.models.codis import Model
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

    image_ids: Int[np.ndarray, " images"]
    text_image_ids: Int[np.ndarray, " texts"]
    text_lengths: Int[np.ndarray, " texts"]
    captions: list[str]
    positions: Int[np.ndarray, " images"]  # of each image in the source
    features: dict[str, Features]  # by the name of the towers
    left_out: int  # images that could not be read
    truncated: int  # captions longer than the model reads


def encode_source(
    model: Model,
    towers: Mapping[str, PyTree],
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    with_tokens: Sequence[str] = (),
    progress: Progress = lambda *_: None,
) -> Gallery:
    """The first `images` (0: all) of a source and all their captions, through each of the `towers`;
    of those in `with_tokens` the tokens are kept too. Images that cannot be read are left out and
    reported. Raises UserError if none can be read or a feature is not finite.
    """
    count = min(images or len(source), len(source))
    max_tokens = config.model.text.max_tokens
    rows = rows_over_shards(min(config.evaluation.batch, count), model.mesh)
    outputs = functools.partial(Outputs, model.mesh, rows)
    of_images = {name: outputs(count, with_tokens=name in with_tokens) for name in towers}
    kept: list[tuple[int, Record]] = []
    unreadable: list[str] = []
    for chunk in _read(source, count, rows, config):
        readable = [(at, record, image) for at, record, image in chunk if record is not None]
        unreadable += [why for _, record, why in chunk if record is None]
        kept += [(at, record) for at, record, _ in readable]
        if readable:
            pixels = np.stack([image for *_, image in readable])
            for name, weights in towers.items():
                of_images[name].add(functools.partial(model.encode_images, weights), pixels)
        progress("images", chunk[-1][0] + 1, count)
    report_unreadable(source, unreadable, count)
    captions = [caption for _, record in kept for caption in record.captions]
    tokens, lengths, truncated = tokenizer.encode(captions, max_tokens)
    if truncated:
        longer = f"{truncated:,} of {len(captions):,} captions are longer than {max_tokens} tokens"
        say(f"{longer}: their ends are cut off")
    features = {}
    for name, weights in towers.items():
        of_texts = outputs(len(captions), with_tokens=name in with_tokens)
        for start in range(0, len(captions), rows):
            part = slice(start, start + rows)
            encode = functools.partial(model.encode_texts, weights)
            of_texts.add(encode, tokens[part], lengths[part])
            progress("texts", of_texts.used, len(captions))
        (image, image_tokens), (text, states) = of_images[name].filled, of_texts.filled
        features[name] = Features(image, text, image_tokens, states)
        _check_finite(name, features[name])
    return Gallery(
        np.array([record.image_id for _, record in kept]),
        np.array([record.image_id for _, record in kept for _ in record.captions]),
        lengths,
        captions,
        np.array([at for at, _ in kept]),
        features,
        len(unreadable),
        truncated,
    )


def rows_over_shards(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows` rounded up to a multiple of the parts that the batch is split into."""
    shards = sharding.data_shards(mesh)
    return -(-rows // shards) * shards


class Outputs:
    """Features and, `with_tokens`, tokens of up to `total` inputs, in arrays allocated once."""

    def __init__(
        self, mesh: jax.sharding.Mesh, rows: int, total: int, *, with_tokens: bool
    ) -> None:
        self._mesh, self._rows, self._total, self._parts = mesh, rows, total, 1 + with_tokens
        self.used = 0
        self._arrays: list[np.ndarray | None] = [None, None]

    def add(self, encode: Callable[..., tuple[Array, Array]], *inputs: np.ndarray) -> None:
        """Encodes up to `rows` inputs, padded with the last one: a valid input, unlike zeros."""
        count = len(inputs[0])
        places = np.arange(self._rows).clip(max=count - 1)
        found = encode(*(sharding.to_device(array[places], self._mesh) for array in inputs))
        for at, part in enumerate(found[: self._parts]):
            values = sharding.to_host(part)[:count]
            if self._arrays[at] is None:
                self._arrays[at] = np.empty((self._total, *values.shape[1:]), values.dtype)
            self._arrays[at][self.used : self.used + count] = values
        self.used += count

    @property
    def filled(self) -> list[np.ndarray | None]:
        return [None if array is None else array[: self.used] for array in self._arrays]


def _read(
    source: Source, count: int, rows: int, config: ml_collections.ConfigDict
) -> Iterator[list[tuple[int, Record | None, np.ndarray | str]]]:
    """Chunks of (position, record, image), or (position, None, why); reads one chunk ahead."""

    def read(position: int) -> tuple[int, Record | None, np.ndarray | str]:
        try:
            record = source[position]
            image = resize_square(decode(record.image), config.model.image.size_px)
            return position, record, image
        except UnreadableImage as error:
            return position, None, str(error)

    with ThreadPoolExecutor(config.data.threads) as pool:
        ahead = []
        for start in range(0, count + rows, rows):
            running, ahead = ahead, [pool.submit(read, at) for at in range(count)[start:][:rows]]
            if running:
                yield [job.result() for job in running]


def report_unreadable(
    source: Source,
    unreadable: Sequence[str],
    count: int,
    one: str = "image",
    several: str = "images",
) -> None:
    """Says how many of `count` could not be read, and why the first; UserError if none could."""
    first = f" (first: {unreadable[0]})" if unreadable else ""
    if len(unreadable) == count:
        raise UserError(f"{source!r} has no {one} to evaluate: 0 of {count:,} could be read{first}")
    if unreadable:
        left_out = f"{len(unreadable):,} of {count:,} {several} could not be read"
        say(f"{left_out} and are left out with their captions{first}")


def _check_finite(name: str, features: Features) -> None:
    for kind, array in (("images", features.image), ("texts", features.text)):
        if bad := int((~np.isfinite(array).all(axis=1)).sum()):
            raise UserError(
                f"the {name}'s features of {bad:,} of {len(array):,} {kind} are not finite and "
                "cannot be ranked: the weights are broken, use an earlier checkpoint"
            )
