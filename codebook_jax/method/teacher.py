"""The momentum teacher: an average of the student's weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def momentum_at(step: Int[Array, ""], *, momentum: float, ramp: bool) -> Float[Array, ""]:
    """The momentum after `step` updates; with `ramp`, at most (1 + s) / (10 + s).

    Source: Duan et al. 2022, 3; the ramp is ours, for runs shorter than 1 / (1 - momentum) steps.
    """
    constant = jnp.asarray(momentum, jnp.float32)
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(constant, (1 + step) / (10 + step)) if ramp else constant


def momentum_average(teacher: Any, student: Any, momentum: Float[Array, ""]) -> Any:
    """momentum x teacher + (1 - momentum) x student, leaf by leaf, in the teacher's own float32."""
    return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, teacher, student)
