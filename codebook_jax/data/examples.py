"""Batches of examples of downstream tasks: pictures, a text, and its label or its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from codebook_jax.data.alike import Alike
from codebook_jax.data.batch import Answers, ExampleBatch
from codebook_jax.data.crops import random_crops
from codebook_jax.data.images import Picture
from codebook_jax.data.mirror import mirrored
from codebook_jax.data.sources import Example
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError, first_few

Target = int | list[tuple[str, float]]  # the number of a label, or answers with their shares


class ExampleSpec(NamedTuple):
    """Batches of examples for a `pipeline.BatchStream`, and what they hold."""

    seed: int
    global_batch: int
    rows: Sequence[int] | np.ndarray | slice  # of the global batch, that this process makes
    size_px: int
    images: int  # of an example
    max_tokens: int  # of a text
    crop_scale: Sequence[float]
    crop_ratio: Sequence[float]
    flip: bool  # as in `pipeline.BatchSpec`; two pictures only if the text names no side
    labels: tuple[str, ...] = ()  # what the answer may be; empty: answers are texts
    answers: int = 0  # at most so many different ones to a question, the most frequent first
    answer_tokens: int = 0  # of an answer
    alike: Alike | None = None

    records = "examples"
    replacement = "a picture cannot be read and its example is replaced by the next one"

    def pictures(self, rows: int) -> UInt8[np.ndarray, "views rows images size size 3"]:
        return np.empty((1, rows, self.images, self.size_px, self.size_px, 3), np.uint8)

    def read(
        self,
        record: Example,
        rng: np.random.Generator,
        pictures: UInt8[np.ndarray, "views images size size 3"],
    ) -> tuple[str, Target, bool]:
        """(text, target, whether its pictures are to be mirrored)"""
        flipped = rng.random()
        for number, image in enumerate(record.images):
            crop = pictures[:, number]
            random_crops(Picture(image), rng, crop, scale=self.crop_scale, ratio=self.crop_ratio)
        target = (
            label_number(record, self.labels)
            if self.labels
            else shared_answers(record, self.answers)
        )
        if not self.flip or flipped >= 0.5:
            return record.text, target, False
        return self._mirrored(record.text, target)

    def _mirrored(self, text: str, target: Target) -> tuple[str, Target, bool]:
        """Text and target of the mirrored pictures, or the given ones where that is not known."""
        as_given, other = (text, target, False), mirrored(text)
        if other is None or (self.images > 1 and other != text):
            return as_given
        if isinstance(target, int):
            return other, target, True
        answers = [(mirrored(answer), share) for answer, share in target]
        return as_given if any(answer is None for answer, _ in answers) else (other, answers, True)

    def batch(
        self,
        pictures: UInt8[np.ndarray, "views rows images size size 3"],
        told: Sequence[tuple[str, Target, bool]],
        tokenizer: Tokenizer,
        numbers: Mapping[str, Int32[np.ndarray, " rows"]],
    ) -> ExampleBatch:
        """The batch of these rows; `numbers` are its fields `example` and `skipped`."""
        texts, targets, flips = zip(*told, strict=True)
        tokens, lengths, _ = tokenizer.encode(texts, self.max_tokens)
        return ExampleBatch(
            images=pictures[0],
            flip=np.array(flips, bool),
            tokens=tokens,
            text_length=lengths,
            target=np.array(targets, np.int32)
            if self.labels
            else self._answers(targets, tokenizer),
            **numbers,
        )

    def _answers(self, targets: Sequence[list[tuple[str, float]]], tokenizer: Tokenizer) -> Answers:
        shape = len(targets), self.answers
        tokens = np.full((*shape, self.answer_tokens), tokenizer.vocabulary.pad_id, np.int32)
        weight = np.zeros(shape, np.float32)
        here = np.arange(self.answers) < np.array(list(map(len, targets)))[:, None]
        flat = [answer for row in targets for answer in row]
        tokens[here] = tokenizer.encode([text for text, _ in flat], self.answer_tokens).tokens
        weight[here] = [share for _, share in flat]
        return Answers(tokens, weight)


def label_number(example: Example, labels: Sequence[str]) -> int:
    """The number of the example's label; raises UserError if it has none of these."""
    if len(example.answers) == 1 and example.answers[0] in labels:
        return labels.index(example.answers[0])
    raise UserError(
        f"{example.key!r} has the label {' and '.join(example.answers) or 'none'}, which is none "
        f"of {first_few(list(labels), 5)}: correct it, or give data of this task"
    )


def shared_answers(example: Example, most: int) -> list[tuple[str, float]]:
    """The `most` frequent answers, each with the share of all that gave it, times the weight."""
    counts = Counter(example.answers)
    whole = max(1, counts.total())
    return [(text, example.weight * count / whole) for text, count in counts.most_common(most)]
