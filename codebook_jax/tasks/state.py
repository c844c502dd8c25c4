"""What a pre-training run remembers from step to step; everything in it is checkpointed."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array, Int

from codebook_jax.method.teacher import Queue
from codebook_jax.method.usage import Usage


@flax.struct.dataclass
class TrainState:
    """The state of one run; randomness is not part of it, since it follows from the seed and the
    step.
    """

    step: Int[Array, ""]  # steps done, skipped ones too: the position in the data
    student: Any  # parameters, float32; the optimizer changes them
    teacher: (
        Any  # like student["towers"], float32, never the same buffers; `teacher.average` changes it
    )
    moments: Any  # of the optimizer
    queue: Queue  # newest teacher features
    usage: Usage  # which codewords won lately
    bad_in_row: Int[Array, ""]  # steps skipped since the last good one because they were not finite
    bad_total: Int[Array, ""]  # in all
