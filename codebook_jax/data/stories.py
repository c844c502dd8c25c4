"""Batches of stories: frames under one crop and sentences, each in order and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from codebook_jax.data.alike import Alike
from codebook_jax.data.batch import StoryBatch
from codebook_jax.data.crops import random_crops
from codebook_jax.data.images import Picture
from codebook_jax.data.sources import Story
from codebook_jax.data.text import Tokenizer


def evenly_spaced(count: int, most: int) -> list[int]:
    """The places of at most `most` of `count` things, in order: the first, ..., the last."""
    chosen = min(count, most)
    return [number * (count - 1) // max(1, chosen - 1) for number in range(chosen)]


class StorySpec(NamedTuple):
    """Batches of stories for a `pipeline.BatchStream`, and what they hold."""

    seed: int
    global_batch: int
    rows: Sequence[int] | np.ndarray | slice  # of the global batch, that this process makes
    size_px: int
    max_frames: int  # of a longer story, evenly spaced frames are read
    max_sentences: int  # and evenly spaced sentences
    max_tokens: int  # of a sentence
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    views: int  # 2: the teacher gets its own crop of the story; 1: the student's
    alike: Alike | None = None

    records = "stories"
    replacement = "a frame cannot be read and its story is replaced by the next one"

    def pictures(self, rows: int) -> UInt8[np.ndarray, "views rows frames size size 3"]:
        shape = (self.views, rows, self.max_frames, self.size_px, self.size_px, 3)
        return np.empty(shape, np.uint8)

    def read(
        self,
        record: Story,
        rng: np.random.Generator,
        pictures: UInt8[np.ndarray, "views frames size size 3"],
    ) -> tuple[int, list[str]]:
        """(frames, sentences). Every frame repeats the draws of the first, so frames of one size
        are cropped alike.
        """
        frames = [
            record.frames[place] for place in evenly_spaced(len(record.frames), self.max_frames)
        ]
        start = rng.bit_generator.state
        for number, frame in enumerate(frames):
            rng.bit_generator.state = start
            crops = pictures[:, number]
            random_crops(Picture(frame), rng, crops, scale=self.crop_scale, ratio=self.crop_ratio)
        pictures[:, len(frames) :] = 0
        told = evenly_spaced(len(record.captions), self.max_sentences)
        return len(frames), [record.captions[place] for place in told]

    def batch(
        self,
        pictures: UInt8[np.ndarray, "views rows frames size size 3"],
        told: Sequence[tuple[int, list[str]]],
        tokenizer: Tokenizer,
        numbers: Mapping[str, Int32[np.ndarray, " rows"]],
    ) -> StoryBatch:
        """The batch of these rows; `numbers` are its fields `example` and `skipped`."""
        frame_counts, sentences = zip(*told, strict=True)
        counts = np.array(list(map(len, sentences)), np.int32)
        real = np.arange(self.max_sentences) < counts[:, None]
        tokens = np.full((*real.shape, self.max_tokens), tokenizer.vocabulary.pad_id, np.int32)
        lengths = np.ones(real.shape, np.int32)
        encoded = tokenizer.encode([each for row in sentences for each in row], self.max_tokens)
        tokens[real], lengths[real] = encoded.tokens, encoded.lengths
        frames = pictures[0]
        return StoryBatch(
            frames=frames,
            teacher_frames=frames if self.views == 1 else pictures[1],
            frame_count=np.array(frame_counts, np.int32),
            tokens=tokens,
            text_length=lengths,
            sentence_count=counts,
            **numbers,
        )
