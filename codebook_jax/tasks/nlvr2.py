"""NLVR2: whether a sentence about two pictures is true.

Each fusion layer is doubled, a block for each picture. Before, text assignment may teach the
doubled layers on pairs: which of two pictures a text belongs to, or neither.
Source: Suhr et al. 2019; Li et al. 2021, 4.4 and appendix.
"""

from __future__ import annotations

import re

import ml_collections
from flax import nnx

from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.models.finetuned import Classifier
from codebook_jax.models.layers import Compute
from codebook_jax.tasks.finetune import Classifying, Finetuning
from codebook_jax.tasks.task import Evaluation

LABELS = ("false", "true")


class Comparing(Classifying):
    """The jitted programs of a run; holds no parameters."""

    reads, images, labels = "comparisons", 2, LABELS

    @staticmethod
    def network_of(
        config: ml_collections.ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> Classifier:
        """A classifier of two labels, for two pictures."""
        return Classifier(config, vocabulary_size, compute, rngs, pictures=2, classes=2)

    @staticmethod
    def pretrained(name: str) -> str | None:
        """Both blocks of a layer start as the fusion encoder's."""
        name = re.sub(r"(/towers/fusion/blocks)/(first|second)/", r"\1/", name)
        return Finetuning.pretrained(name)

    def judged(self, found: Predicted) -> Evaluation:
        """Accuracy."""
        raise NotImplementedError
