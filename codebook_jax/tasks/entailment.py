"""Visual entailment (SNLI-VE): whether a picture makes a sentence true, false, or leaves it open.

Three classes on the fused [CLS]. Source: Xie et al. 2019; Li et al. 2021, 4.4.
"""

from __future__ import annotations

import ml_collections
from flax import nnx

from codebook_jax.models.finetuned import Classifier
from codebook_jax.models.layers import Compute
from codebook_jax.tasks.classifying import Classifying

LABELS = ("contradiction", "neutral", "entailment")  # SNLI-VE's codes 0, 1, 2


class Entailment(Classifying):
    """The jitted programs of a run; holds no parameters."""

    reads, labels = "statements", LABELS

    @staticmethod
    def network_of(
        config: ml_collections.ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> Classifier:
        """A classifier of three labels."""
        return Classifier(config, vocabulary_size, compute, rngs, pictures=1, classes=len(LABELS))
