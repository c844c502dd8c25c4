"""Retrieval after pre-training: alignment and matching, with all texts of an image as positives.

Source: Li et al. 2021, 4.1.
"""

from __future__ import annotations

from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.task import ARCHITECTURE


class Retrieval(Pretraining):
    """The jitted programs of a run; holds no parameters."""

    adopts = ARCHITECTURE
