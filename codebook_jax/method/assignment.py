"""How features are assigned to codewords: by optimal transport or without it, behind one signature.

`assign(cost, valid) -> plan`: costs [batch, codes] and which rows are there to a plan whose rows
sum to 1 / (number of valid rows) exactly. By transport, columns sum to 1 / codes as far as the
iterations reached: `column_error` tells how far. This is the only importer of ott.
In equations, T is the plan, D the costs, N the number of valid rows and K that of codewords.
Source: Duan et al. 2022, 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn

from codebook_jax.method.numerics import (
    NEVER,
    at_least_once,
    default_types,
    require,
    unit,
    wide_enough,
)

Assign = Callable[
    [Float[Array, "batch codes"], Bool[Array, " batch"]], Float[Array, "batch codes"]
]  # costs, and which rows are there, to a plan


def codeword_costs(
    features: Float[Array, "*some batch dim"], codes: Float[Array, "codes dim"]
) -> Float[Array, "*some batch codes"]:
    """Cosine distances 1 - z . c, from 0 to 2, of features and codewords of length one (`unit`).

    In at least float32. Source: Duan et al. 2022, 3.1.

    >>> print(codeword_costs(jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.eye(2)))
    [[0. 1.]
     [2. 1.]]
    """
    kind = wide_enough(features.dtype, codes.dtype)
    features, codes = features.astype(kind), codes.astype(kind)
    return 1 - jnp.einsum("...bd,kd->...bk", features, codes, precision="highest")


def make_plan(
    cost: Float[Array, "*some batch codes"],
    assign: Assign,
    *,
    valid: Bool[Array, "*some batch"] | None = None,
) -> Float[Array, "*some batch codes"]:
    """The plan that sends equal mass from each feature to the codewords, as `assign` chooses them.

    Leading axes are separate problems, solved in one batched call. Rows sum to 1 / (number of valid
    rows); a row that is not `valid`, or whose cost is not finite, gets no mass and takes none from
    the others. `valid` None means all. No gradient passes. Source: Duan et al. 2022, 3.1.

    >>> cost = jnp.array([[0.0, 1.0], [0.0, 1.0]])
    >>> make_plan(cost, sinkhorn(epsilon=0.05, iterations=50))  # equal mass
    Array([[0.25, 0.25],
           [0.25, 0.25]], dtype=float32)
    >>> make_plan(cost, nearest())
    Array([[0.5, 0. ],
           [0.5, 0. ]], dtype=float32)
    """
    cost = jax.lax.stop_gradient(cost).astype(wide_enough(cost.dtype))
    here = jnp.all(jnp.isfinite(cost), axis=-1)
    if valid is not None:
        here = here & valid
    cost = jnp.where(here[..., None], cost, 1.0)
    for _ in range(cost.ndim - 2):
        assign = jax.vmap(assign)
    return jax.lax.stop_gradient(assign(cost, here))


def sinkhorn(*, epsilon: float = 0.05, iterations: int = 50) -> Assign:
    """Entropic transport, by ott; codewords get equal mass. `epsilon` is in units of the costs.

        min_T sum_ij T_ij D_ij + epsilon sum_ij T_ij log T_ij

    over T whose rows sum to 1/N and columns to 1/K. Raises ValueError unless `epsilon` is above 0
    and `iterations` at least 1. Source: Cuturi 2013, 3 and 4. Departure: the log domain, and a last
    row update.

    >>> cost = jnp.array([[0.0, 0.2], [0.0, 0.4]])  # both prefer the first
    >>> print((100 * make_plan(cost, sinkhorn())).round())  # percent of mass
    [[ 6. 44.]
     [44.  6.]]
    """
    return unbalanced(epsilon=epsilon, tau=1.0, iterations=iterations)


def swav(*, epsilon: float = 0.05, iterations: int = 3) -> Assign:
    """The same sweeps as `sinkhorn`, but three: SwAV's cheap default (Caron et al. 2020, 3.1).

    Codewords get equal mass only roughly; `column_error` says how far they are from it. Raises
    ValueError as `sinkhorn` does.

    >>> cost = jnp.array([[0.0, 0.2], [0.0, 0.8]])
    >>> print((100 * make_plan(cost, swav())).round())
    [[ 7. 43.]
     [50.  0.]]
    """
    return sinkhorn(epsilon=epsilon, iterations=iterations)


def unbalanced(*, epsilon: float = 0.05, tau: float = 0.9, iterations: int = 50) -> Assign:
    """Transport whose codewords are only pulled towards equal mass, by ott.

        min_T sum_ij (T_ij D_ij + epsilon T_ij log T_ij) + rho KL(columns, 1/K)

    over T whose rows sum to 1/N, at tau = rho / (rho + epsilon): 1 is `sinkhorn`, towards 0 every
    feature chooses alone. For data whose concepts are not equally frequent. Raises ValueError as
    `sinkhorn` does, and unless 0 < tau <= 1. Source: Chizat et al. 2018.

    >>> cost = jnp.array([[0.0, 0.2], [0.0, 0.8]])
    >>> print((100 * make_plan(cost, unbalanced(tau=0.5))).round())
    [[42.  8.]
     [50.  0.]]
    """
    require(epsilon > 0, f"epsilon={epsilon} must be above 0")
    require(0 < tau <= 1, f"tau={tau} must be above 0 and at most 1")
    at_least_once(iterations)

    def assign(cost: Array, here: Array) -> Array:
        """The plan of the rows that are here."""
        # A row that is not here has marginal zero, so ott leaves it without mass. A fixed count
        # (threshold < 0) costs the same every step and never waits for the host;
        # inner_iterations must divide it, or ott silently runs fewer.
        marginal = here.astype(cost.dtype)
        marginal = marginal / jnp.maximum(marginal.sum(), 1)
        with default_types(cost.dtype):
            problem = linear_problem.LinearProblem(
                geometry.Geometry(cost_matrix=cost, epsilon=epsilon), a=marginal, tau_b=tau
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


def ipot(*, beta: float = 0.5, iterations: int = 50) -> Assign:
    """The inexact proximal point method, with one Sinkhorn sweep for a and b per iteration.

        T_ij <- a_i exp(-D_ij / beta) T_ij b_j, from T_ij = 1

    Near the plan of `sinkhorn` at epsilon = beta / iterations. Raises ValueError unless `beta` is
    above 0 and `iterations` at least 1. Source: Xie et al. 2018, algorithm 1. Departure: log
    potentials, since the plan itself underflows, and a last row update.

    >>> cost = jnp.array([[0.0, 0.2], [0.0, 0.8]])
    >>> print((100 * make_plan(cost, ipot())).round())
    [[ 0. 50.]
     [50.  0.]]
    """
    require(beta > 0, f"beta={beta} must be above 0")
    at_least_once(iterations)

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


def nearest() -> Assign:
    """No transport: T_ij is 1/N for the codeword j nearest to feature i, the first if some tie.

    For codes that are averages of what chose them: `update_codes`. Source: van den Oord et al.
    2017, 3.1.

    >>> print(make_plan(jnp.array([[0.0, 0.2], [0.0, 0.8]]), nearest()))
    [[0.5 0. ]
     [0.5 0. ]]
    """

    def assign(cost: Array, here: Array) -> Array:
        """The plan of the rows that are here."""
        chosen = jax.nn.one_hot(jnp.argmin(cost, axis=1), cost.shape[1], dtype=cost.dtype)
        return chosen * _mass(here, cost.dtype)

    return assign


def softmax(*, temperature: float = 0.04, center: Float[Array, " codes"] | None = None) -> Assign:
    """No transport: each feature's own soft code, softmax((1 - D_i - center) / temperature) / N.

    `center` is the running mean of the cosines with each codeword (`update_center`), which keeps a
    few codewords from winning everything. Raises ValueError unless `temperature` is above 0.
    Source: DINO (Caron et al. 2021, 3.1).

    >>> cost = jnp.array([[0.0, 0.2], [0.0, 0.8]])
    >>> print((100 * make_plan(cost, softmax(temperature=0.2))).round())
    [[37. 13.]
     [49.  1.]]
    """
    require(temperature > 0, f"temperature={temperature} must be above 0")

    def assign(cost: Array, here: Array) -> Array:
        """The plan of the rows that are here."""
        shifted = cost if center is None else cost + center.astype(cost.dtype)
        return _rows_to_marginal(-shifted / temperature, here)

    return assign


def update_center(
    center: Float[Array, " codes"],
    cost: Float[Array, "*some batch codes"],
    *,
    momentum: float = 0.9,
    valid: Bool[Array, "*some batch"] | None = None,
) -> Float[Array, " codes"]:
    """The running mean of the cosines with each codeword, which `softmax` subtracts, one batch on.

        center <- momentum center + (1 - momentum) mean_i (1 - D_i)

    The mean is over rows that are valid and finite; without any, `center` stays. Source: DINO
    (Caron et al. 2021, 3.1).

    >>> cost = jnp.array([[0.0, 1.0], [0.5, 1.0]])
    >>> print(update_center(jnp.zeros(2), cost, momentum=0.0))
    [0.75 0.  ]
    """
    rows = 1 - jax.lax.stop_gradient(cost).reshape(-1, cost.shape[-1])
    here = jnp.ones(len(rows), bool) if valid is None else valid.ravel()
    here = (here & jnp.all(jnp.isfinite(rows), axis=1)).astype(rows.dtype)
    rows = jnp.where(here[:, None] > 0, rows, 0)
    mean = rows.sum(axis=0) / jnp.maximum(here.sum(), 1)
    return jnp.where(here.sum() > 0, momentum * center + (1 - momentum) * mean, center)


@flax.struct.dataclass
class RunningCodes:
    """Codewords as running means of the features that chose them; `codes` are their directions.

    `running_codes` starts them, `update_codes` and `move_unused` return new ones.
    """

    means: Float[Array, "codes dim"]
    sizes: Float[Array, " codes"]  # running number of features that chose each
    idle: Int[Array, " codes"]  # updates since some feature chose it

    @property
    def codes(self) -> Float[Array, "codes dim"]:
        """Rows of length one."""
        return unit(self.means)


def running_codes(codes: Float[Array, "codes dim"]) -> RunningCodes:
    """Running means that start at these codewords, as if one feature had chosen each.

    Source: ours.

    >>> print(running_codes(jnp.array([[3.0, 4.0]])).sizes)
    [1.]
    """
    size = len(codes)
    return RunningCodes(unit(codes), jnp.ones(size, codes.dtype), jnp.zeros(size, jnp.int32))


def update_codes(
    codes: RunningCodes,
    sums: Float[Array, "codes dim"],
    counts: Float[Array, " codes"],
    decay: float,
) -> RunningCodes:
    """The running means after a batch in which `counts` features, with `sums`, chose each codeword.

        means <- (decay sizes means + (1 - decay) sums) / (new sizes)
        sizes <- decay sizes + (1 - decay) counts

    The mean of a codeword that none chose stays. Source: VQ-VAE (van den Oord et al. 2017, A.1).

    >>> sums, counts = jnp.array([[0.0, 3.0], [0.0, 0.0]]), jnp.array([3.0, 0.0])
    >>> new = update_codes(running_codes(jnp.eye(2)), sums, counts, 0.5)
    >>> print(new.means, new.sizes, new.idle)
    [[0.25 0.75]
     [0.   1.  ]] [2.  0.5] [0 1]
    """
    sizes = decay * codes.sizes + (1 - decay) * counts
    chosen = counts > 0
    moved = decay * codes.sizes[:, None] * codes.means + (1 - decay) * sums
    means = moved / jnp.where(chosen, sizes, 1)[:, None]
    means = jnp.where(chosen[:, None], means, codes.means)
    return RunningCodes(means, sizes, jnp.where(chosen, 0, codes.idle + 1))


def move_unused(
    codes: RunningCodes,
    features: Float[Array, "rows dim"],
    cost: Float[Array, "rows codes"],
    *,
    window: int,
) -> RunningCodes:
    """Codewords that no feature chose for `window` updates go to the features served worst.

    At most one codeword for each feature, the one with the largest min_j cost_ij first; a feature
    whose cost is not finite draws none. A codeword that moved has size 1 again. Source: ours.

    >>> codes = running_codes(jnp.eye(2)).replace(idle=jnp.array([0, 9]))
    >>> rows = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> cost = codeword_costs(rows, codes.codes)
    >>> print(move_unused(codes, rows, cost, window=5).means)
    [[ 1.  0.]
     [-1.  0.]]
    """
    here = jnp.all(jnp.isfinite(cost), axis=1)
    worst = jnp.argsort(jnp.where(here, -cost.min(axis=1), jnp.inf))
    unused = codes.idle >= window
    place = jnp.cumsum(unused) - 1  # of each unused codeword among them
    moved = unused & (place < jnp.sum(here))
    target = features[worst[jnp.minimum(place, len(features) - 1)]]
    return RunningCodes(
        jnp.where(moved[:, None], target, codes.means),
        jnp.where(moved, 1, codes.sizes),
        jnp.where(moved, 0, codes.idle),
    )


def column_error(plan: Float[Array, "*some batch codes"]) -> Float[Array, "*some"]:
    """sum_j |sum_i T_ij - 1/K|: how far codewords are from equal mass, from 0 to 2 (1 - 1/K).

    Source: Altschuler et al. 2017, who stop Sinkhorn's iterations by it.

    >>> print(column_error(jnp.array([[0.5, 0.0], [0.5, 0.0]])))
    1.0
    """
    return jnp.abs(plan.sum(-2) - 1 / plan.shape[-1]).sum(-1)


def row_error(
    plan: Float[Array, "*some batch codes"], valid: Bool[Array, "*some batch"] | None = None
) -> Float[Array, "*some"]:
    """sum_i |sum_j T_ij - u_i|, where u_i is 1/N for each of N valid rows and 0 for the others.

    `valid` None means all. Source: as `column_error`.

    >>> print(row_error(jnp.array([[0.5, 0.0], [0.0, 0.25]])))
    0.25
    """
    rows = plan.sum(-1)
    here = jnp.ones(rows.shape, bool) if valid is None else valid
    here = here.astype(rows.dtype)
    target = here / jnp.maximum(here.sum(-1, keepdims=True), 1)
    return jnp.abs(rows - target).sum(-1)


def _rows_to_marginal(
    scores: Float[Array, "batch codes"], here: Bool[Array, " batch"]
) -> Float[Array, "batch codes"]:
    """Scale every row to its exact marginal: the last half-iteration of the solvers."""
    return jax.nn.softmax(scores, axis=-1) * _mass(here, scores.dtype)


def _mass(here: Bool[Array, " batch"], dtype: jnp.dtype) -> Float[Array, "batch 1"]:
    here = here.astype(dtype)
    return (here / jnp.maximum(here.sum(), 1))[:, None]
