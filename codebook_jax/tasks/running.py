"""What an assignment without transport remembers from step to step in pre-training."""

from __future__ import annotations

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from codebook_jax.method import assignment
from codebook_jax.method.assignment import RunningCodes

# The codewords of the solver "nearest", the centre of "softmax".
Running = RunningCodes | Float[Array, " codes"]


def first(section: ml_collections.ConfigDict, codes: Float[Array, "codes dim"]) -> Running | None:
    """What `config.codebook` makes a run remember at its start."""
    if section.solver == "nearest":
        return assignment.running_codes(codes)
    return jnp.zeros_like(codes[:, 0]) if section.solver == "softmax" else None


def centred(
    running: Running | None, costs: Float[Array, "*some rows codes"]
) -> Float[Array, "*some rows codes"]:
    """The costs that "softmax" assigns by."""
    return costs if running is None or isinstance(running, RunningCodes) else costs + running


def advance(
    section: ml_collections.ConfigDict,
    running: Running,
    features: Float[Array, "rows dim"],
    costs: Float[Array, "rows codes"],
    soft: Float[Array, "rows codes"],
) -> Running:
    """It after a batch of teacher features, with their costs and soft codes."""
    if not isinstance(running, RunningCodes):
        return assignment.update_center(running, costs, momentum=section.center_momentum)
    sums = jnp.einsum("rk,rd->kd", soft, features, precision="highest")
    running = assignment.update_codes(running, sums, soft.sum(axis=0), section.decay)
    return assignment.move_unused(running, features, costs, window=section.move_unused_after)
