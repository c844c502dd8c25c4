"""Optimal-transport plans between features and codewords; the only importer of ott.

A plan T [batch, codes] has rows that sum to 1 / batch exactly (both solvers end with a row update)
and columns that sum to 1 / codes as far as the iterations reached: `column_error` says how far.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from codebook_jax.method.ambient import default_types, wide_enough

# Stands for minus infinity in float32 and float64 alike, without the NaN of inf - inf.
_NEVER = -1e30


def codeword_costs(
    features: Float[Array, "*some batch dim"], codes: Float[Array, "codes dim"]
) -> Float[Array, "*some batch codes"]:
    """Cosine distance 1 - z.c of unit features to codewords, in at least float32 (Duan et al.

    2022, 3.1).
    """
    kind = wide_enough(features.dtype, codes.dtype)
    features, codes = features.astype(kind), codes.astype(kind)
    return 1 - jnp.einsum("...bd,kd->...bk", features, codes, precision="highest")


def transport_plan(
    cost: Float[Array, "*some batch codes"],
    *,
    solver: str,
    epsilon: float,
    iterations: int,
    ipot_beta: float,
    valid: Bool[Array, "*some batch"] | None = None,
) -> Float[Array, "*some batch codes"]:
    """The plan that sends equal mass from each feature and gives equal mass to each codeword.

    Leading axes are separate problems, solved in one batched call. Rows sum to 1 / (number of valid
    rows); a row that is not `valid`, or whose cost is not finite, gets no mass and takes none from
    the others. No gradient passes.

    Args:
      solver: "sinkhorn" (entropic at the absolute `epsilon`, `iterations` of log-domain updates by
      ott) or "ipot"
        (inexact proximal point with weight `ipot_beta`, one sweep for each of `iterations` outer
        steps).
      valid: features that take part; all of them when None.

    Source: Duan et al. 2022, 3.1; Cuturi 2013; Xie et al. 2018 (IPOT). Departure: the log domain,
    and a last row update.
    """
    kind = wide_enough(cost.dtype)
    cost = jax.lax.stop_gradient(cost).astype(kind)
    here = jnp.all(jnp.isfinite(cost), axis=-1)
    if valid is not None:
        here = here & valid
    cost = jnp.where(here[..., None], cost, 1.0)
    if solver == "sinkhorn":
        solve = lambda c, h: _sinkhorn(c, h, epsilon=epsilon, iterations=iterations)  # noqa: E731
    elif solver == "ipot":
        solve = lambda c, h: _ipot(c, h, beta=ipot_beta, iterations=iterations)  # noqa: E731
    else:
        raise ValueError(f'codebook.solver="{solver}" is neither "sinkhorn" nor "ipot".')
    for _ in range(cost.ndim - 2):
        solve = jax.vmap(solve)
    return jax.lax.stop_gradient(solve(cost, here))


def column_error(plan: Float[Array, "*some batch codes"]) -> Float[Array, "*some"]:
    """Total L1 distance of the column sums from the uniform marginal 1 / codes."""
    return jnp.abs(plan.sum(-2) - 1 / plan.shape[-1]).sum(-1)


def row_error(
    plan: Float[Array, "*some batch codes"], valid: Bool[Array, "*some batch"] | None = None
) -> Float[Array, "*some"]:
    """Total L1 distance of the row sums from the uniform marginal over the valid rows."""
    rows = plan.sum(-1)
    here = jnp.ones(rows.shape, bool) if valid is None else valid
    here = here.astype(rows.dtype)
    target = here / jnp.maximum(here.sum(-1, keepdims=True), 1)
    return jnp.abs(rows - target).sum(-1)


def _log_marginal(here: Bool[Array, "batch"], kind) -> Float[Array, "batch"]:
    """log of the uniform marginal over the rows that are here; practically minus infinity
    elsewhere.
    """
    count = jnp.maximum(here.sum(dtype=kind), 1)
    return jnp.where(here, -jnp.log(count), _NEVER)


def _rows_to_marginal(
    scores: Float[Array, "batch codes"], here: Bool[Array, "batch"]
) -> Float[Array, "batch codes"]:
    """Scale every row to its exact marginal: the last half-iteration of both solvers."""
    here = here.astype(scores.dtype)
    return jax.nn.softmax(scores, axis=-1) * (here / jnp.maximum(here.sum(), 1))[:, None]


def _sinkhorn(cost, here, *, epsilon: float, iterations: int):
    # A row that is not here has marginal zero, so ott leaves it without mass. A fixed count
    # (threshold < 0) costs the same every step and never waits for the host; inner_iterations must
    # divide it, or ott silently runs fewer.
    marginal = here.astype(cost.dtype)
    marginal = marginal / jnp.maximum(marginal.sum(), 1)
    with default_types(cost.dtype):
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=cost, epsilon=epsilon), a=marginal
        )
        solved = sinkhorn.Sinkhorn(
            threshold=-1.0,
            min_iterations=iterations,
            max_iterations=iterations,
            inner_iterations=iterations,
            lse_mode=True,
        )(problem)
    return _rows_to_marginal((solved.g[None, :] - cost) / epsilon, here)


def _ipot(cost, here, *, beta: float, iterations: int):
    log_rows = _log_marginal(here, cost.dtype)
    log_columns = -jnp.log(jnp.asarray(cost.shape[1], cost.dtype))

    def outer(carry, _):
        log_plan, log_b = carry
        log_kernel = log_plan - cost / beta
        log_a = log_rows - jax.nn.logsumexp(log_kernel + log_b[None, :], axis=1)
        log_b = log_columns - jax.nn.logsumexp(log_kernel + log_a[:, None], axis=0)
        return (log_kernel + log_a[:, None] + log_b[None, :], log_b), None

    start = (jnp.zeros_like(cost), jnp.zeros_like(cost[0]))
    (log_plan, _), _ = jax.lax.scan(outer, start, length=iterations)
    return _rows_to_marginal(log_plan, here)
