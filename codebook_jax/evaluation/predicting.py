"""A program's outputs for every example of a source, in chunks of one shape."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt8

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Example, Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation.encoding import (
    Progress,
    read_ahead,
    report_unreadable,
    rows_over_shards,
)
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers

# Pictures [rows, images, side, side, 3], tokens and lengths of texts to outputs for every row.
Program = Callable[[Array, Array, Array], PyTree]
Pictures = UInt8[np.ndarray, "images side side 3"]


class _Read(NamedTuple):
    """What was read at a position."""

    pixels: Pictures  # black where nothing was
    example: Example | None = None  # without its pictures
    size: tuple[int, int] = (0, 0)  # height and width of the first
    failure: str = ""  # why its pictures cannot be read


class Predicted(NamedTuple):
    """What a program gave for the examples that could be read."""

    examples: list[Example]  # without their pictures
    sizes: list[tuple[int, int]]  # height and width of each one's first picture
    outputs: PyTree[Shaped[np.ndarray, "examples ..."]]
    left_out: int  # examples whose pictures could not be read
    truncated: int  # texts longer than the model reads
    unlisted: int = 0  # examples of the list that the source left out


def predict(
    program: Program,
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    images: int,
    pictures: int = 1,
    progress: Progress | None = None,
) -> Predicted:
    """The outputs for the first `images` (0: all) examples of a source, of so many `pictures` each,
    which are seen whole. Every process reads its share, and gets the outputs of all. Examples that
    one of them cannot read are left out and reported; raises UserError if none can be read.
    """
    count = min(images or len(source), len(source))
    rows = rows_over_shards(min(config.evaluation.batch, count), mesh)
    starts, own = range(0, count, rows), sharding.process_rows(mesh, rows)
    shape = pictures, config.model.image.size_px, config.model.image.size_px, 3
    read = functools.partial(_read, source, count, shape)
    chunks = read_ahead(read, (start + own for start in starts), config.data.threads)
    kept, unreadable, outputs, truncated = {}, {}, [], 0
    for start, chunk in zip(starts, chunks, strict=True):
        for at, each in zip((start + own).tolist(), chunk, strict=True):
            if each.example is not None:
                kept[at] = each.example, each.size
            elif each.failure:
                unreadable[at] = each.failure
        texts = [each.example.text if each.example else "" for each in chunk]
        tokens, lengths, cut = tokenizer.encode(texts, config.model.text.max_tokens)
        truncated += cut
        inputs = np.stack([each.pixels for each in chunk]), tokens, lengths
        found = program(*(sharding.put_batch(array, mesh) for array in inputs))
        outputs.append(jax.tree.map(sharding.to_host, found))
        if progress is not None:
            progress(source.evaluated, min(start + rows, count), count)
    everyone = peers.connected().exchange(source.evaluated, (kept, unreadable, truncated))
    of_all, without, cuts = zip(*everyone, strict=True)
    kept, unreadable = (dict(sorted(ChainMap(*each).items())) for each in (of_all, without))
    report_unreadable(source, list(unreadable.values()), count, "example", "examples")
    positions = [at for at in kept if at not in unreadable]  # several may have read one
    truncated = sum(cuts)
    if truncated:
        longer = (
            f"{truncated:,} of {len(positions):,} texts are longer than {tokens.shape[1]} tokens"
        )
        say(f"{longer}: their ends are cut off")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[positions], *outputs)
    examples, sizes = zip(*(kept[at] for at in positions), strict=True)
    unlisted = source.listed - len(source)
    return Predicted(list(examples), list(sizes), joined, len(unreadable), truncated, unlisted)


def _read(source: Source, count: int, shape: tuple[int, ...], position: int) -> _Read:
    """The example at a position with its pictures resized, if there is one and it can be read."""
    nothing = _Read(np.zeros(shape, np.uint8))
    if position >= count:
        return nothing
    try:
        example = source[position]
        found = [decode(image) for image in example.images]
    except UnreadableImage as error:
        return nothing._replace(failure=str(error))
    pixels = np.stack([resize_square(picture, shape[1]) for picture in found])
    return _Read(pixels, example._replace(images=()), found[0].shape[:2])
