"""Alignment of two sequences whose order counts, such as frames and sentences.

Each pair of sequences is a small transport problem between its steps: similar steps attract, and so
do steps at similar places. Masks say which steps exist; they may have gaps, and N and M are counts
of valid steps. Everything is computed in at least float32. Source: Su & Hua, CVPR 2017 (TPAMI
2019), "Order-Preserving Wasserstein Distance for Sequence Matching", with cosine distances.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from codebook_jax.method.numerics import NEVER, require, wide_enough

CELLS_AT_ONCE = 2**22  # costs at once: a few float32 arrays of 16 MB each


class Order(NamedTuple):
    """How `align_steps` matches two sequences; Python numbers, static under jit.

    Source: Su & Hua 2017, 3; slack: Chapel et al. 2020, 3.

    >>> cost, here = jnp.ones((1, 3, 3)), jnp.ones((1, 3), bool)  # all steps alike
    >>> plan = align_steps(cost, Order(locality=1.0), here, here)
    >>> print((100 * plan[0]).round())
    [[26.  7.  0.]
     [ 7. 20.  7.]
     [ 0.  7. 26.]]
    """

    locality: float = 0.5  # lambda1: reward for steps at the same relative place
    spread: float = 0.1  # lambda2: weight of the diagonal prior, and the entropic epsilon
    width: float = 1.0  # delta: standard deviation of the prior, in steps off the diagonal
    slack: float = 1.0  # the share of either sequence's mass that is matched; 1 is all of it
    iterations: int = 100  # Sinkhorn's, a fixed count


def order_costs(
    cost: Float[Array, "batch n m"],
    order: Order,
    valid_n: Bool[Array, "batch n"],
    valid_m: Bool[Array, "batch m"],
) -> Float[Array, "batch n m"]:
    """C = cost - locality / (r^2 + 1) + spread r^2 / (2 width^2 (1/N^2 + 1/M^2)), r = i/N - j/M.

    i and j count valid steps from 1; entries of other steps mean nothing. Raises ValueError for an
    `order` out of range and for masks that do not fit `cost`. Source: Su & Hua 2017, 3.
    """
    _check_order(order)
    _check_steps("valid_n", valid_n, cost, 1)
    _check_steps("valid_m", valid_m, cost, 2)
    kind = wide_enough(cost.dtype)
    cost, n, m = cost.astype(kind), _count(valid_n, kind), _count(valid_m, kind)
    place_n = jnp.cumsum(valid_n, axis=1, dtype=kind) / n
    place_m = jnp.cumsum(valid_m, axis=1, dtype=kind) / m
    squared = (place_n[:, :, None] - place_m[:, None, :]) ** 2
    variance = order.width**2 * (1 / n**2 + 1 / m**2)[:, :, None]
    return cost - order.locality / (squared + 1) + order.spread * squared / (2 * variance)


def align_steps(
    cost: Float[Array, "batch n m"],
    order: Order | None,
    valid_n: Bool[Array, "batch n"],
    valid_m: Bool[Array, "batch m"],
    *,
    epsilon: float = 0.1,
) -> Float[Array, "batch n m"]:
    """The plan A that matches the steps of each pair, with marginals 1/N and 1/M on valid steps.

        min_A sum_ij A_ij C_ij + spread sum_ij A_ij log A_ij, with r = i/N - j/M and
        C = cost - locality / (r^2 + 1) + spread r^2 / (2 width^2 (1/N^2 + 1/M^2))

    `cost` is that of the steps alone, such as 1 - cosine. `order` None ignores the order: C is
    `cost`, and `epsilon`, not used otherwise, stands for spread. Rows sum to 1/N exactly (the last
    update is theirs), columns to 1/M as far as the iterations reached. A step that is not valid, or
    has no finite cost, gets no mass and no place in the order; another cost that is not finite
    forbids its pair. If a sequence has no steps, the plan is zero. No gradient passes.

    With slack s < 1 a dummy step joins either sequence. Its mass is 1 - s, and it may not match the
    other dummy, so the real steps of either sequence leave 1 - s to it and match s: rows sum to at
    most 1/N, the plan to s as far as the iterations reached (Chapel et al., NeurIPS 2020, 3; a
    dummy takes a fixed mass, so what it costs does not matter). The entropy includes what goes to
    the dummies. Raises ValueError for an `order` or `epsilon` out of range and for masks that do
    not fit `cost`. Source: Su & Hua 2017, 3.

    >>> cost = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    >>> here = jnp.ones((1, 3), bool)  # steps A, B, A in both
    >>> print((100 * align_steps(cost, Order(), here, here)[0]).round())
    [[31.  0.  2.]
     [ 0. 33.  0.]
     [ 2.  0. 31.]]
    """
    require(epsilon > 0, f"epsilon={epsilon} is not above 0.")
    _check_steps("valid_n", valid_n, cost, 1)
    _check_steps("valid_m", valid_m, cost, 2)
    cost = jax.lax.stop_gradient(cost).astype(wide_enough(cost.dtype))
    allowed = jnp.isfinite(cost) & valid_n[:, :, None] & valid_m[:, None, :]
    cost = jnp.where(allowed, cost, 1)
    here_n, here_m = jnp.any(allowed, axis=2), jnp.any(allowed, axis=1)
    slack, iterations = 1.0, Order().iterations
    if order is not None:
        cost = order_costs(cost, order, here_n, here_m)
        epsilon, slack, iterations = order.spread, order.slack, order.iterations
    rows, columns = (
        here.astype(cost.dtype) / _count(here, cost.dtype) for here in (here_n, here_m)
    )
    pairs = allowed
    if slack < 1:
        after, corner = ((0, 0), (0, 1)), ((0, 0), (0, 1), (0, 1))
        rows, columns = (
            jnp.pad(side, after, constant_values=1 - slack) for side in (rows, columns)
        )
        cost = jnp.pad(cost, corner)
        pairs = jnp.pad(allowed, corner, constant_values=True).at[:, -1, -1].set(False)
        pairs = pairs & (rows > 0)[:, :, None] & (columns > 0)[:, None, :]
    plan = _transport(jnp.where(pairs, -cost / epsilon, NEVER), rows, columns, iterations)
    return jnp.where(allowed, plan[:, : allowed.shape[1], : allowed.shape[2]], 0)


def carry(
    plan: Float[Array, "batch n m"], codes_q: Float[Array, "batch n k"]
) -> Float[Array, "batch m k"]:
    """Codes of one sequence's steps as the other's steps receive them: M sum_i A_ij q_i.

    Divided by the mass that arrived rather than by 1/M, which columns only come close to: if rows
    of `codes_q` sum to 1, so do these, and zero rows of it do not count. A step that gets no mass
    gets zeros. The other way is `carry(plan.mT, codes_of_m)`.
    """
    _check_steps("codes_q", codes_q, plan, 1)
    plan, codes_q = _widened(plan, codes_q)
    codes_q = _where_mass(plan.sum(2), codes_q)
    coded = (codes_q.sum(2) > 0).astype(plan.dtype)
    carried = jnp.einsum("bnm,bnk->bmk", plan, codes_q, precision="highest")
    mass = jnp.einsum("bnm,bn->bm", plan, coded, precision="highest")[:, :, None]
    return jnp.where(mass > 0, carried / jnp.where(mass > 0, mass, 1), 0)


def matched(plan: Float[Array, "batch n m"], axis: int) -> Float[Array, "batch steps"]:
    """The share, 0 to 1, of each step's mass that is matched: all without slack. Sums over `axis`,
    that of the other side's steps.
    """
    mass = plan.sum(axis=axis)
    return jnp.minimum(mass * jnp.sum(mass > 0, axis=1, keepdims=True), 1)


def cosines(
    z_n: Float[Array, "batch n dim"], z_m: Float[Array, "batch m dim"]
) -> Float[Array, "batch n m"]:
    """Of every step with every step of the other sequence; features have length one."""
    return jnp.einsum("bnd,bmd->bnm", z_n, z_m, precision="highest")


def sequence_similarity(
    z_n: Float[Array, "batch n dim"],
    z_m: Float[Array, "batch m dim"],
    plan: Float[Array, "batch n m"],
) -> Float[Array, " batch"]:
    """sum_ij A_ij z_i . z_j of two sequences aligned by A, from -1 to 1 for steps of length one.

    Features of steps without mass do not count, whatever they are. Raises ValueError if the shapes
    do not fit together. Source: Su & Hua 2017, 3, whose distance is sum_ij A_ij (1 - z_i . z_j).

    >>> z, plan = jnp.eye(2)[None], jnp.eye(2)[None] / 2
    >>> print(sequence_similarity(z, z, plan))
    [1.]
    """
    _check_steps("z_n", z_n, plan, 1)
    _check_steps("z_m", z_m, plan, 2)
    z_n, z_m, plan = _widened(z_n, z_m, plan)
    z_n, z_m = _where_mass(plan.sum(2), z_n), _where_mass(plan.sum(1), z_m)
    return jnp.sum(plan * cosines(z_n, z_m), axis=(1, 2))


def sequence_similarities(
    z_a: Float[Array, "a n dim"],
    z_b: Float[Array, "b m dim"],
    order: Order | None,
    valid_a: Bool[Array, "a n"],
    valid_b: Bool[Array, "b m"],
    *,
    epsilon: float = 0.1,
) -> Float[Array, "a b"]:
    """The similarity of every pair of sequences, for retrieval and contrast.

    Features are of length one. `order` and `epsilon` are those of `align_steps`. Rows are compared
    in chunks of about CELLS_AT_ONCE costs. Raises ValueError as `align_steps` does. Source: as
    `sequence_similarity`.

    >>> z = jnp.stack([jnp.eye(3), jnp.eye(3)[::-1]])  # forwards and backwards
    >>> order, here = Order(locality=5.0), jnp.ones((2, 3), bool)
    >>> print((100 * sequence_similarities(z, z, order, here, here)).round())
    [[100.  33.]
     [ 33. 100.]]
    """
    z_a, z_b = _widened(z_a, z_b)
    rows = max(1, CELLS_AT_ONCE // (z_a.shape[1] * len(z_b) * z_b.shape[1]))

    def against_all(one: tuple[Array, Array]) -> Array:
        """One sequence's similarity to all of b."""
        z, valid = (jnp.broadcast_to(part, (len(z_b), *part.shape)) for part in one)
        plan = align_steps(1 - cosines(z, z_b), order, valid, valid_b, epsilon=epsilon)
        return sequence_similarity(z, z_b, plan)

    return jax.lax.map(against_all, (z_a, valid_a), batch_size=min(rows, len(z_a)))


def _transport(log_kernel: Array, rows: Array, columns: Array, iterations: int) -> Array:
    """Sinkhorn in the log domain (Cuturi 2013), ending with rows; a side may have zero mass."""
    log_rows, log_columns = (
        jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)), NEVER)
        for mass in (rows, columns)
    )

    def sweep(log_b: Array, _: None) -> tuple[Array, None]:
        log_a = log_rows - jax.nn.logsumexp(log_kernel + log_b[:, None, :], axis=2)
        return log_columns - jax.nn.logsumexp(log_kernel + log_a[:, :, None], axis=1), None

    log_b, _ = jax.lax.scan(sweep, jnp.zeros_like(columns), length=iterations)
    return jax.nn.softmax(log_kernel + log_b[:, None, :], axis=2) * rows[:, :, None]


def _count(here: Bool[Array, "batch steps"], kind: jnp.dtype) -> Float[Array, "batch 1"]:
    """The number of valid steps, at least 1."""
    return jnp.maximum(jnp.sum(here, axis=1, keepdims=True, dtype=kind), 1)


def _where_mass(mass: Float[Array, "batch steps"], values: Array) -> Array:
    return jnp.where((mass > 0)[:, :, None], values, 0)


def _widened(*arrays: Array) -> list[Array]:
    kind = wide_enough(*(array.dtype for array in arrays))
    return [array.astype(kind) for array in arrays]


def _check_order(order: Order) -> None:
    for field, fits, limits in (
        ("spread", order.spread > 0, "above 0"),
        ("width", order.width > 0, "above 0"),
        ("slack", 0 < order.slack <= 1, "above 0 and at most 1"),
        ("iterations", order.iterations >= 1, "at least 1"),
    ):
        require(fits, f"order.{field}={getattr(order, field)} must be {limits}.")


def _check_steps(name: str, array: Array, other: Array, axis: int) -> None:
    """Refuses [batch, steps, ...] if `other` has another batch or other steps on `axis`."""
    require(
        array.shape[:2] == (other.shape[0], other.shape[axis]),
        f"{name} {array.shape} does not fit the costs or the plan {other.shape}: batch and steps "
        f"are axes 0 and {axis} there.",
    )
