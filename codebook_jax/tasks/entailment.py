"""Visual entailment (SNLI-VE): whether a picture makes a sentence true, false, or leaves it open.

Three classes on the fused [CLS]. Source: Xie et al. 2019; Li et al. 2021, 4.4.
"""

from __future__ import annotations

from codebook_jax.models.finetuned import LABELS
from codebook_jax.tasks.classifying import Classifying


class Entailment(Classifying):
    """The jitted programs of a run; holds no parameters."""

    reads, labels = "statements", LABELS["entailment"]
