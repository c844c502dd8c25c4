"""CODIS vision-language pre-training in JAX/Flax (Duan et al., CVPR 2022). The README maps paper to
files.

model = codebook_jax.load("runs/first")  # after --mode=export
model.encode_text(["a red ring above a blue star"]) @ model.encode_image(["a.png", "b.png"]).T
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.weights.load import Codis

__all__ = ["UserError", "load"]


def load(path: str | os.PathLike, *, teacher: bool = False) -> Codis:
    """The model of an export, or of a workdir with one.

    Of pre-training it has `encode_image`, `encode_text`, `match`, `codes`, `classify`, `explain`
    and `ground`; fine-tuned, the verb of its task: `answer`, `entails`, `compare` or `classify`.

    With `teacher` it encodes with the teacher's towers, which must be in the export. Runs on JAX's
    default device, whatever the run was trained on. Raises UserError if the path holds no usable
    export.
    """
    from codebook_jax.weights import load as inference

    return inference.load(path, teacher=teacher)
