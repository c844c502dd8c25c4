"""NLVR2: whether a sentence about two pictures is true.

Each fusion layer is doubled, a block for each picture. Before, text assignment may teach the
doubled layers on pairs: which of two pictures a text belongs to, or neither.
Source: Suhr et al. 2019; Li et al. 2021, 4.4 and appendix.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation import comparisons
from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.evaluation.submissions import write_comparisons
from codebook_jax.models.finetuned import LABELS
from codebook_jax.tasks.classifying import Classifying
from codebook_jax.tasks.finetune import Finetuning, scalars_of
from codebook_jax.tasks.task import Evaluation


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
        return (("nlvr2_predictions.csv", write),) if not found.left_out else ()
