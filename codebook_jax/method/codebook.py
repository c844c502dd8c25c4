"""The codebook: costs, transport plans, code losses, and how codewords are used.

The only importer of ott. A plan T [batch, codes] has rows that sum to 1 / batch exactly, since both
solvers end with a row update, and columns that sum to 1 / codes as far as the iterations reached:
`column_error` tells how far. Source: Duan et al. 2022, 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn

from codebook_jax.method.numerics import NEVER, default_types, wide_enough
from codebook_jax.method.pair import Pair


def codeword_costs(
    features: Float[Array, "*some batch dim"], codes: Float[Array, "codes dim"]
) -> Float[Array, "*some batch codes"]:
    """Cosine distance 1 - z.c of unit vectors, in at least float32 (Duan et al. 2022, 3.1)."""
    kind = wide_enough(features.dtype, codes.dtype)
    features, codes = features.astype(kind), codes.astype(kind)
    return 1 - jnp.einsum("...bd,kd->...bk", features, codes, precision="highest")


Assign = Callable[
    [Float[Array, "batch codes"], Bool[Array, " batch"]], Float[Array, "batch codes"]
]  # costs, and which rows are there, to a plan


def transport_plan(
    cost: Float[Array, "*some batch codes"],
    assign: Assign,
    *,
    valid: Bool[Array, "*some batch"] | None = None,
) -> Float[Array, "*some batch codes"]:
    """The plan that sends equal mass from each feature to the codewords, as `assign` chooses them.

    Leading axes are separate problems, solved in one batched call. Rows sum to 1 / (number of valid
    rows); a row that is not `valid`, or whose cost is not finite, gets no mass and takes none from
    the others. `valid` None means all. No gradient passes.
    """
    cost = jax.lax.stop_gradient(cost).astype(wide_enough(cost.dtype))
    here = jnp.all(jnp.isfinite(cost), axis=-1)
    if valid is not None:
        here = here & valid
    cost = jnp.where(here[..., None], cost, 1.0)
    for _ in range(cost.ndim - 2):
        assign = jax.vmap(assign)
    return jax.lax.stop_gradient(assign(cost, here))


def sinkhorn(*, epsilon: float, iterations: int) -> Assign:
    """Entropic transport at the absolute `epsilon`, by ott; codewords get equal mass (Cuturi 2013).

    Departure: the log domain, and a last row update.
    """

    def assign(cost: Array, here: Array) -> Array:
        """The plan of the rows that are here."""
        # A row that is not here has marginal zero, so ott leaves it without mass. A fixed count
        # (threshold < 0) costs the same every step and never waits for the host;
        # inner_iterations must divide it, or ott silently runs fewer.
        marginal = here.astype(cost.dtype)
        marginal = marginal / jnp.maximum(marginal.sum(), 1)
        with default_types(cost.dtype):
            problem = linear_problem.LinearProblem(
                geometry.Geometry(cost_matrix=cost, epsilon=epsilon), a=marginal
            )
            solved = ott_sinkhorn.Sinkhorn(
                threshold=-1.0,
                min_iterations=iterations,
                max_iterations=iterations,
                inner_iterations=iterations,
                lse_mode=True,
            )(problem)
        return _rows_to_marginal((solved.g[None, :] - cost) / epsilon, here)

    return assign


def ipot(*, beta: float, iterations: int) -> Assign:
    """The inexact proximal point method, one sweep per outer iteration (Xie et al. 2018).

    Departure: log potentials, since the plan itself underflows, and a last row update.
    """

    def assign(cost: Array, here: Array) -> Array:
        """The plan of the rows that are here."""
        rows = jnp.maximum(here.sum(dtype=cost.dtype), 1)
        log_rows = jnp.where(here, -jnp.log(rows), NEVER)
        log_columns = -jnp.log(jnp.asarray(cost.shape[1], cost.dtype))

        def outer(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            log_plan, log_b = carry
            log_kernel = log_plan - cost / beta
            log_a = log_rows - jax.nn.logsumexp(log_kernel + log_b[None, :], axis=1)
            log_b = log_columns - jax.nn.logsumexp(log_kernel + log_a[:, None], axis=0)
            return (log_kernel + log_a[:, None] + log_b[None, :], log_b), None

        start = (jnp.zeros_like(cost), jnp.zeros_like(cost[0]))
        (log_plan, _), _ = jax.lax.scan(outer, start, length=iterations)
        return _rows_to_marginal(log_plan, here)

    return assign


def soft_codes(plan: Float[Array, "2 rows codes"], batch: int) -> Float[Array, "2 batch codes"]:
    """q = N T of the batch's rows: each sums to 1, except for a row left out of the transport."""
    rows = plan[:, :batch]
    mass = rows.sum(axis=-1, keepdims=True)
    return rows / jnp.where(mass > 0, mass, 1)


class CodeLosses(NamedTuple):
    """The parts of L_code; their sum is the loss."""

    transport: Float[Array, ""]  # L_ot: moves codewords to the teacher features assigned to them
    text_to_code: Float[Array, ""]  # L_t2p: the text student predicts the image teacher's codes
    image_to_code: Float[Array, ""]  # L_i2p: the image student predicts the text teacher's codes


def codebook_losses(
    student: Pair,  # z_v, z_t: Float[Array, "batch dim"] each
    teacher: Pair,  # z'_v, z'_t: Float[Array, "batch dim"] each
    codes: Float[Array, "codes dim"],  # rows of length one
    assignment: Pair,  # q_v, q_t: Float[Array, "batch codes"] each, rows sum to 1
    *,
    temperature: float,
) -> CodeLosses:
    """Teacher features choose codewords by transport, the other modality's student predicts them.

    The codebook learns from all three, the student from the last two, the teacher and the
    assignment from none. Source: Duan et al. 2022, 3.1; temperature as SwAV's (Caron et al. 2020).
    """
    chosen = jax.lax.stop_gradient(jnp.stack(assignment))  # [2, batch, codes]
    learned = jnp.stack(student)
    fixed = jax.lax.stop_gradient(jnp.stack(teacher))
    to_codes = jnp.einsum("msbd,kd->msbk", jnp.stack([learned, fixed]), codes, precision="highest")
    transport = jnp.sum(chosen * (1 - to_codes[1]), axis=-1).mean(axis=1).sum()
    log_p = jax.nn.log_softmax(to_codes[0] / temperature)
    predicted = -jnp.sum(chosen[::-1] * log_p, axis=-1).mean(axis=1)  # image predicts q_t, text q_v
    return CodeLosses(transport, predicted[1], predicted[0])


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


@flax.struct.dataclass
class Usage:
    """The codeword that won each of the newest samples, a ring; -1 where nothing is stored yet."""

    winners: Int[Array, "2 window"]
    cursor: Int[Array, ""]


def empty_usage(window: int) -> Usage:
    return Usage(jnp.full((2, window), -1, jnp.int32), jnp.int32(0))


def add_winners(usage: Usage, winners: Int[Array, "2 batch"]) -> Usage:
    """The window with one batch (its first samples, if it is larger) in place of its oldest."""
    window = usage.winners.shape[1]
    winners = winners[:, :window].astype(jnp.int32)
    places = (usage.cursor + jnp.arange(winners.shape[1], dtype=jnp.int32)) % window
    ring = usage.winners.at[:, places].set(winners, unique_indices=True)
    return Usage(ring, (usage.cursor + winners.shape[1]) % window)


def perplexity_and_unused(usage: Usage, codes: int) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """exp(entropy) of the winners and the share of unused codewords, by modality (image, text)."""
    here = usage.winners >= 0
    row = jnp.arange(2, dtype=jnp.int32)[:, None]
    counts = (
        jnp.zeros((2, codes), jnp.float32)
        .at[row, jnp.where(here, usage.winners, codes)]
        .add(1, mode="drop")
    )
    share = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), 1)
    return jnp.exp(entropy), (counts == 0).mean(axis=1, dtype=jnp.float32)


def codebook_scalars(
    usage: Usage, plan: Float[Array, "2 rows codes"], batch: int
) -> dict[str, Float[Array, ""]]:
    """Metrics of the assignment; the plan's first `batch` rows are the batch's."""
    soft, codes = soft_codes(plan, batch), plan.shape[-1]
    perplexity, unused = perplexity_and_unused(usage, codes)
    chosen = jax.lax.argmax(soft, 2, jnp.int32)
    samples = jnp.sum(usage.winners[0] >= 0, dtype=jnp.int32)  # as many of both modalities
    unused_if_uniform = jnp.exp(samples.astype(jnp.float32) * math.log1p(-1 / codes))
    return {
        "codebook/perplexity": perplexity.mean(),
        "codebook/perplexity_image": perplexity[0],
        "codebook/perplexity_text": perplexity[1],
        "codebook/unused_share": unused.mean(),
        "codebook/unused_share_uniform": unused_if_uniform,
        "codebook/assignment_entropy": -jnp.sum(jax.scipy.special.xlogy(soft, soft), -1).mean(),
        "codebook/agreement": jnp.mean(chosen[0] == chosen[1], dtype=jnp.float32),
        "transport/column_error": column_error(plan).max(),
        "transport/row_error": row_error(plan, jnp.sum(plan, axis=-1) > 0).max(),
    }


def _rows_to_marginal(
    scores: Float[Array, "batch codes"], here: Bool[Array, " batch"]
) -> Float[Array, "batch codes"]:
    """Scale every row to its exact marginal: the last half-iteration of both solvers."""
    here = here.astype(scores.dtype)
    return jax.nn.softmax(scores, axis=-1) * (here / jnp.maximum(here.sum(), 1))[:, None]
