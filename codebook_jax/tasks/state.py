"""What pre-training remembers from step to step, and what it hands on within a step."""

from __future__ import annotations

from typing import NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from codebook_jax.method.codebook import Usage
from codebook_jax.method.queue import Queue
from codebook_jax.tasks.draws import Pair
from codebook_jax.tasks.running import Running

Plan = Float[Array, "2 rows codes"]


class Counting:
    """What states share that have `step`, `bad_in_row` and `bad_total`."""

    @property
    def updates(self) -> Int[Array, ""]:
        """Steps that changed the parameters, which the schedules count."""
        return self.step - self.bad_total

    def then(self, good: Bool[Array, ""], after: Self) -> Self:
        """`after` if the step was good; a bad one changes only the counts and the position."""
        chosen = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, self)
        return chosen.replace(
            step=self.step + 1,
            bad_in_row=jnp.where(good, 0, self.bad_in_row + 1),
            bad_total=self.bad_total + (~good).astype(jnp.int32),
        )


@flax.struct.dataclass
class TrainState(Counting):
    """The state of one run, without its randomness, which follows from the seed and the step; what
    its config does not use is None.
    """

    step: Int[Array, ""]  # steps done, skipped ones too: the position in the data
    student: PyTree  # parameters, float32; the optimizer changes them
    # like student["towers"], in its own buffers; `momentum_average` changes it
    teacher: PyTree | None
    moments: PyTree  # of the optimizer
    queue: Queue | None  # newest teacher features
    usage: Usage | None  # which codewords won lately
    bad_in_row: Int[Array, ""]  # steps skipped since the last good one because they were not finite
    bad_total: Int[Array, ""]  # in all
    running: Running | None = None  # none of the solvers by transport

    @property
    def teaching(self) -> PyTree:
        """The towers whose features teach: the teacher's or, without one, the student's own."""
        return self.student["towers"] if self.teacher is None else self.teacher


class Taught(NamedTuple):
    """The teacher's outputs for a batch."""

    features: Pair  # z'_v, z'_t
    masked_states: Float[Array, "batch slots width"] | None  # fused, at the hidden words


class Targets(NamedTuple):
    """What the student's features of the global batch are compared with."""

    features: Pair  # the teacher's
    plan: Plan | None  # of the teacher's features over the codewords
    image_id: Int[Array, " batch"]


class Learned(NamedTuple):
    """The student's outputs for a batch before fusion."""

    features: Pair  # z_v, z_t
    image_tokens: Float[Array, "batch patches width"]
    text_states: Float[Array, "batch tokens width"]
    masked_states: Float[Array, "batch tokens width"] | None  # of the texts with hidden words
