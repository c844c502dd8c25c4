"""What every loaded model shares: how it reads images and texts, in chunks of few shapes."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int32, UInt8
from ml_collections import ConfigDict

from codebook_jax.data.images import resize_square
from codebook_jax.data.text import Tokenizer, has_words
from codebook_jax.errors import UserError, first_few
from codebook_jax.weights.inputs import Picture, pixels_of

BUCKETS = (1, 4, 16, 64)  # rows that calls are padded to; one compiled program each
READERS = min(8, os.cpu_count() or 1)  # threads that decode images
Tokenised = tuple[Int32[np.ndarray, "texts tokens"], Int32[np.ndarray, " texts"]]  # and lengths


class Loaded:
    """A loaded model, which can be used from several threads.

    Images are one or several file paths, open binary files, contents of files (bytes), PIL images,
    or uint8 arrays [height, width, 3] or [height, width], read as in evaluation: upright, on white,
    resized to the model's square. Texts are one string or several; what is truncated or unknown to
    the tokenizer gives a warning. An unreadable input raises UserError, which names its position.
    """

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, items: dict[str, Any], step: int
    ) -> None:
        self.config, self.step = config, step
        self._tokenizer, self._items = tokenizer, jax.device_put(items)

    def __getattr__(self, name: str) -> Any:
        verbs = [each for each in dir(type(self)) if not each.startswith("_")]
        raise AttributeError(
            f"a loaded {type(self).__name__} has no {name!r} but {', '.join(verbs)}: other tasks' "
            "verbs come with the export of a run of theirs"
        )

    def _pixel_chunks(
        self, pictures: list[Picture]
    ) -> Iterator[tuple[UInt8[np.ndarray, "rows side side 3"], int]]:
        """Images padded to a bucket, and their number; the pixels of only one chunk are in memory
        at a time.
        """
        side = self.config.model.image.size_px

        def read(position: int) -> UInt8[np.ndarray, "side side 3"]:
            return resize_square(pixels_of(pictures[position], position), side)

        with ThreadPoolExecutor(READERS) as pool:
            for positions, count in chunks(len(pictures)):
                pixels = np.stack(list(pool.map(read, positions[:count])))
                yield pixels[positions - positions[0]], count

    def _tokenised(self, texts: list[str]) -> Tokenised:
        """Tokens and lengths; warns about truncated texts and unknown words."""
        most = self.config.model.text.max_tokens
        tokens, lengths, truncated = self._tokenizer.encode(texts, most)
        for position, text in enumerate(texts):
            if lengths[position] <= 2 or not has_words(text):  # [CLS] [SEP]
                raise UserError(f"text {position}, {text!r}, has no words: leave it out")
        if truncated:
            _warn(
                f"{truncated:,} of {len(texts):,} texts are longer than the {most} tokens that "
                "this model reads: they are truncated"
            )
        if np.any(tokens == self._tokenizer.unknown_id):
            words = first_few(list(map(repr, self._tokenizer.unknown_words(texts))), 5)
            _warn(
                f"this model's tokenizer does not know {words}: the model reads them "
                "all as the same unknown word"
            )
        return tokens, lengths


def _warn(sentence: str) -> None:
    """Warns at the line that called this package, however deep that call has gone."""
    frame, level, package = inspect.currentframe(), 1, __name__.partition(".")[0]
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)


def chunks(count: int) -> Iterator[tuple[Int[np.ndarray, " rows"], int]]:
    """Positions of at most the largest bucket, and their number; to fill a bucket the last one is
    repeated: a valid input, which zeros are not.
    """
    for start in range(0, count, BUCKETS[-1]):
        stop = min(start + BUCKETS[-1], count)
        rows = next(bucket for bucket in BUCKETS if bucket >= stop - start)
        yield np.minimum(np.arange(start, start + rows), stop - 1), stop - start
