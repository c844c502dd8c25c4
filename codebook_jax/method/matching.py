"""Hard negatives and the matching loss (Li et al. 2021, 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method.numerics import NEVER


def may_be_negatives(image_id: Int[Array, " rows"], groups: int) -> Bool[Array, "rows group"]:
    """Which members of its group each row may take as a negative: those of other images."""
    ids = image_id.reshape(groups, -1)
    return (ids[:, :, None] != ids[:, None, :]).reshape(len(image_id), -1)


def draw_negatives(
    queries: Float[Array, "rows dim"],
    candidates: Float[Array, "rows dim"],
    allowed: Bool[Array, "rows group"],
    noise: Float[Array, "rows group"],
    groups: int,
    *,
    temperature: Float[Array, ""],
) -> Int[Array, " rows"]:
    """A member of each row's group, drawn from softmax(query . candidate / temperature).

    Returns the place in the group, which is meaningless if none is allowed. `noise` is Gumbel
    noise: the largest logit + noise is a draw. No gradient passes. Source: Li et al. 2021, 3.2.
    """
    split = lambda x: x.reshape(groups, -1, x.shape[-1])  # noqa: E731
    cosines = jnp.einsum("gqd,gcd->gqc", split(queries), split(candidates), precision="highest")
    cosines = cosines.reshape(noise.shape)
    logits = jnp.where(allowed, jax.lax.stop_gradient(cosines / temperature) + noise, NEVER)
    return jax.lax.argmax(logits, 1, jnp.int32)


def matching_loss(
    logits: Float[Array, "pairs 2"], match: Bool[Array, " pairs"], weights: Float[Array, " pairs"]
) -> Float[Array, ""]:
    """Weighted sum of cross-entropies, "match" is class 1 (Li et al. 2021, 3.2)."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(weights * jnp.where(match, log_p[:, 1], log_p[:, 0]))
