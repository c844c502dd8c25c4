"""A program's outputs for every example of a source, in chunks of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt8

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Example, Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation.encoding import Progress, report_unreadable, rows_over_shards
from codebook_jax.parallel import sharding

# Pictures [rows, images, side, side, 3], tokens and lengths of texts to outputs for every row.
Program = Callable[[Array, Array, Array], PyTree]
Pictures = UInt8[np.ndarray, "images side side 3"]
Read = tuple[Example, Pictures, tuple[int, int]] | tuple[None, str, None]


class Predicted(NamedTuple):
    """What a program gave for the examples that could be read."""

    examples: list[Example]  # without their pictures
    sizes: list[tuple[int, int]]  # height and width of each one's first picture
    outputs: PyTree[Shaped[np.ndarray, "examples ..."]]
    left_out: int  # examples whose pictures could not be read
    truncated: int  # texts longer than the model reads


def predict(
    program: Program,
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    images: int,
    progress: Progress | None = None,
) -> Predicted:
    """The outputs for the first `images` (0: all) examples of a source, whose pictures are seen
    whole. Those that cannot be read are left out and reported; raises UserError if none can.
    """
    count = min(images or len(source), len(source))
    rows = rows_over_shards(min(config.evaluation.batch, count), mesh)
    kept, sizes, outputs, unreadable, truncated = [], [], [], [], 0
    for start, chunk in _chunks(source, count, rows, config):
        readable = [read for read in chunk if read[0] is not None]
        unreadable += [why for example, why, _ in chunk if example is None]
        if readable:
            examples, seen, of_seen = zip(*readable, strict=True)
            kept, sizes = kept + list(examples), sizes + list(of_seen)
            texts = [example.text for example in examples]
            tokens, lengths, cut = tokenizer.encode(texts, config.model.text.max_tokens)
            truncated += cut
            places = np.arange(rows).clip(max=len(examples) - 1)  # padded with a valid example
            inputs = (array[places] for array in (np.stack(seen), tokens, lengths))
            found = program(*(sharding.to_device(array, mesh) for array in inputs))
            host = jax.tree.map(lambda x: sharding.to_host(x)[: len(examples)], found)  # noqa: B023
            outputs.append(host)
        if progress is not None:
            progress(source.evaluated, start + len(chunk), count)
    report_unreadable(source, unreadable, count, "example", "examples")
    if truncated:
        longer = f"{truncated:,} of {len(kept):,} texts are longer than {tokens.shape[1]} tokens"
        say(f"{longer}: their ends are cut off")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
    return Predicted(kept, sizes, joined, len(unreadable), truncated)


def _chunks(
    source: Source, count: int, rows: int, config: ml_collections.ConfigDict
) -> Iterator[tuple[int, list[Read]]]:
    """(first position, its examples with pictures, or with why they cannot be read); reads one
    chunk ahead.
    """
    side = config.model.image.size_px

    def read(position: int) -> Read:
        try:
            example = source[position]
            pictures = [decode(image) for image in example.images]
            seen = np.stack([resize_square(picture, side) for picture in pictures])
            return example._replace(images=()), seen, pictures[0].shape[:2]
        except UnreadableImage as error:
            return None, str(error), None

    with ThreadPoolExecutor(config.data.threads) as pool:
        ahead = []
        for start in range(0, count + rows, rows):
            running, ahead = ahead, [pool.submit(read, at) for at in range(count)[start:][:rows]]
            if running:
                yield start - rows, [job.result() for job in running]
