"""NLVR2: whether a sentence about two pictures is true.

Each fusion layer is doubled, a block for each picture. Before, text assignment may teach the
doubled layers on pairs: which of two pictures a text belongs to, or neither.
Source: Suhr et al. 2019; Li et al. 2021, 4.4 and appendix.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from codebook_jax.data.batch import Batch
from codebook_jax.data.pipeline import BatchSpec
from codebook_jax.data.sources import Example, Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation import comparisons
from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.evaluation.submissions import write_comparisons
from codebook_jax.models.finetuned import LABELS
from codebook_jax.tasks.classifying import Classifying
from codebook_jax.tasks.draws import augmented
from codebook_jax.tasks.finetune import (
    FinetuneState,
    Finetuning,
    Rows,
    check_ids,
    scalars_of,
    submission,
)
from codebook_jax.tasks.task import Evaluation, Task

SUBMISSION = "nlvr2_predictions.csv"


class Comparing(Classifying):
    """The jitted programs of a run; holds no parameters."""

    reads, images, labels = "comparisons", 2, LABELS["nlvr2"]

    @staticmethod
    def pretrained(name: str) -> str | None:
        """Both blocks of a layer start as the fusion encoder's."""
        name = re.sub(r"(/towers/fusion/blocks)/(first|second)/", r"\1/", name)
        return Finetuning.pretrained(name)

    def judged(self, found: Predicted, tokenizer: Tokenizer) -> Evaluation:
        """Accuracy and consistency."""
        check_ids(found, "statements")
        judged = super().judged(found, tokenizer)
        references = {each.key: each.answers[0] for each in found.examples if each.answers}
        if not references:
            return judged
        pairs = ((each.key, self.answer(found, at)) for at, each in enumerate(found.examples))
        compared = comparisons.compare(
            {key: answer for key, answer in pairs if key in references}, references
        )
        figures = judged.results["student"] | compared.figures()
        return judged._replace(
            results={"student": figures},
            scalars=scalars_of(figures),
            table=comparisons.format_table(compared),
        )

    def files(self, found: Predicted) -> tuple[tuple[str, Callable[[Path], str]], ...]:
        """The submission: True or False for every identifier."""
        known = [each.key for each in found.examples]
        answers = [(key, self.answer(found, at).capitalize()) for at, key in enumerate(known)]
        write = functools.partial(write_comparisons, answers=answers, known=known)
        return ((SUBMISSION, submission(found, write)),)


class TextAssignment(Comparing):
    """The stage before: which of two pictures a text of a pair belongs to, or neither."""

    reads, labels = "pairs", LABELS["text_assignment"]

    def abstract_batch(self) -> Batch:
        """Shapes, types and shardings of a global batch of pairs."""
        return Task.abstract_batch(self)

    def batch_spec(self) -> BatchSpec:
        """What this process's rows of a batch hold: pairs."""
        return Task.batch_spec(self)

    def evaluate(
        self, state: FinetuneState, source: Source, tokenizer: Tokenizer, **options: Any
    ) -> Evaluation:
        """Predicts and judges texts of pairs with pictures of those that follow."""
        return super().evaluate(state, _Assigned(source, self.labels), tokenizer, **options)

    judged, files = Classifying.judged, Classifying.files  # no statements are compared

    def draw(self, batch: Batch, key: Key[Array, ""]) -> Rows:
        """Each text with two pictures: its own and the next row's in either order, or the next two
        rows'. A row whose next two have its image id is as good as a wrong label, and rare.
        """
        label_key, view_key = jax.random.split(key)
        rows, data = len(batch.tokens), self.config.data
        image = batch.image
        if data.flip or data.randaugment_layers:
            image = augmented(image, batch.flip, view_key, data)
        label = jax.random.randint(label_key, (rows,), 0, len(self.labels), jnp.int32)
        following, after = (jnp.roll(image, -by, axis=0) for by in (1, 2))
        first, second, _ = (label[:, None, None, None] == each for each in range(3))
        left = jnp.where(first, image, following)
        right = jnp.where(second, image, jnp.where(first, following, after))
        return Rows(jnp.stack([left, right], axis=1), batch.tokens, batch.text_length, label)


class _Assigned(Source):
    """Each text of a source of pairs with two pictures, and which of them is its own: the labels in
    turn; the other pictures are those of the next pairs.
    """

    def __init__(self, source: Source, labels: Sequence[str]) -> None:
        self._source, self._labels = source, labels
        self.listed, self.left_out = source.listed, source.left_out

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        count = len(self)
        own, following, after = (self._source[(index + by) % count] for by in range(3))
        of_label = ((own, following), (following, own), (following, after))
        number = index % len(of_label)
        return Example(
            images=tuple(record.image for record in of_label[number]),
            text=own.captions[0],
            answers=(self._labels[number],),
            key=self.name(index),
            image_id=own.image_id,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __repr__(self) -> str:
        return repr(self._source)
