"""The momentum teacher: an average of the student's weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def momentum_at(step: Int[Array, ""], *, momentum: float, ramp: bool) -> Float[Array, ""]:
    """The momentum after `step` updates; with `ramp`, at most (1 + step) / (10 + step).

    `momentum` is from 0 to 1. Source: Duan et al. 2022, 3; the ramp is ours, for runs shorter than
    1 / (1 - momentum) steps.

    >>> for step in (0, 90, 9000):
    ...     momentum = momentum_at(jnp.int32(step), momentum=0.995, ramp=True)
    ...     print(f"{momentum:.3f}")
    0.100
    0.910
    0.995
    """
    constant = jnp.asarray(momentum, jnp.float32)
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(constant, (1 + step) / (10 + step)) if ramp else constant


def momentum_average(teacher: Any, student: Any, momentum: Float[Array, ""]) -> Any:
    """momentum x teacher + (1 - momentum) x student, leaf by leaf, in the teacher's own float32.

    JAX raises ValueError if the trees differ. Source: MoCo (He et al. 2020, 3.2); Li et al. 2021,
    3.2.

    >>> teacher, student = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    >>> print(momentum_average(teacher, student, jnp.float32(0.75))["w"])
    [0.75 0.75]
    """
    return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, teacher, student)
