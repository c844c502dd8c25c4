"""Hard negatives and the matching loss (Li et al. 2021, 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebook_jax.method.numerics import NEVER


def may_be_negatives(image_id: Int[Array, " rows"], groups: int) -> Bool[Array, "rows group"]:
    """Which members of its group each row may take as a negative: those of other images.

    The rows split into `groups` equal contiguous groups; JAX raises TypeError if they do not.
    Source: Li et al. 2021, 3.2. Departure: every row with the same id is left out, not only
    the row itself.

    >>> print(may_be_negatives(jnp.array([5, 5, 5, 6]), groups=2))
    [[False False]
     [False False]
     [False  True]
     [ True False]]
    """
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

        argmax over allowed j of query . candidate_j / temperature + noise_j

    Returns the place in the group, which is meaningless if none is allowed. Gumbel `noise` makes
    the largest a draw, zeros take the likeliest. No gradient passes. Source: Li et al. 2021, 3.2.

    >>> z, allowed = jnp.eye(3), may_be_negatives(jnp.arange(3), groups=1)
    >>> noise = jnp.zeros((3, 3)).at[:, 2].set(0.5)
    >>> tau = jnp.float32(0.07)
    >>> print(draw_negatives(z, z, allowed, noise, 1, temperature=tau))
    [2 2 0]
    """
    split = lambda x: x.reshape(groups, -1, x.shape[-1])  # noqa: E731
    cosines = jnp.einsum("gqd,gcd->gqc", split(queries), split(candidates), precision="highest")
    cosines = cosines.reshape(noise.shape)
    logits = jnp.where(allowed, jax.lax.stop_gradient(cosines / temperature) + noise, NEVER)
    return jax.lax.argmax(logits, 1, jnp.int32)


def matching_loss(
    logits: Float[Array, "pairs 2"], match: Bool[Array, " pairs"], weights: Float[Array, " pairs"]
) -> Float[Array, ""]:
    """Weighted sum of cross-entropies: - sum_i w_i log softmax(logits_i)[match_i].

    Class 1 means match. Source: Li et al. 2021, 3.2.

    >>> match, weights = jnp.array([True, False]), jnp.full(2, 0.5)
    >>> loss = matching_loss(jnp.zeros((2, 2)), match, weights)
    >>> print(f"{loss:.3f}")  # log 2
    0.693
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(weights * jnp.where(match, log_p[:, 1], log_p[:, 0]))
