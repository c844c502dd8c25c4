"""Transport plans against scipy, converged plans and closed forms (test_objective.py has the
solvers' loops).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import sinkhorn_plan
from scipy.optimize import linear_sum_assignment, linprog

from codebook_jax.method.assignment import (
    codeword_costs,
    column_error,
    ipot,
    make_plan,
    row_error,
    sinkhorn,
)

SINKHORN = sinkhorn(epsilon=0.05, iterations=50)
IPOT = ipot(beta=0.5, iterations=50)


def _unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _costs(seed, batch=61, codes=127, dim=17):
    rng = np.random.default_rng(seed)
    return np.asarray(codeword_costs(_unit(rng, batch, dim), _unit(rng, codes, dim)))


def test_default_sinkhorn_has_exact_rows_and_a_small_column_error():
    plan = make_plan(_costs(0), SINKHORN)
    np.testing.assert_allclose(plan.sum(1), 1 / 61, rtol=1e-5)
    assert float(row_error(plan)) < 1e-5
    assert float(column_error(plan)) <= 1e-3


def test_the_default_number_of_iterations_comes_close_to_the_plan_of_many():
    cost = _costs(1)
    converged = sinkhorn_plan(cost, epsilon=0.05, iterations=1000)
    np.testing.assert_allclose(make_plan(cost, SINKHORN), converged, rtol=5e-3, atol=1e-9)


def test_equal_sizes_tend_to_the_assignment_as_epsilon_falls():
    cost = _costs(2, batch=11, codes=11, dim=5)
    rows, columns = linear_sum_assignment(cost)
    plan = np.asarray(make_plan(cost, sinkhorn(epsilon=1e-3, iterations=20_000)))
    assert (plan[rows].argmax(1) == columns).all()
    np.testing.assert_allclose((plan * cost).sum(), cost[rows, columns].mean(), rtol=1e-2)


def test_unequal_sizes_tend_to_the_linear_programme_as_epsilon_falls():
    cost = _costs(3, batch=6, codes=10, dim=4)
    batch, codes = cost.shape
    constraints = np.concatenate(
        [np.kron(np.eye(batch), np.ones(codes)), np.kron(np.ones(batch), np.eye(codes))]
    )
    marginals = np.concatenate([np.full(batch, 1 / batch), np.full(codes, 1 / codes)])
    best = linprog(cost.ravel(), A_eq=constraints, b_eq=marginals).fun
    plan = make_plan(cost, sinkhorn(epsilon=1e-3, iterations=20_000))
    np.testing.assert_allclose((plan * cost).sum(), best, rtol=1e-2)


def test_ipot_is_the_converged_sinkhorn_of_its_effective_epsilon():
    cost = _costs(4)
    plan = np.asarray(make_plan(cost, IPOT))
    converged = sinkhorn_plan(cost, epsilon=0.5 / 50, iterations=5000)
    assert np.abs(plan - converged).sum() <= 0.01
    np.testing.assert_allclose(plan.sum(1), 1 / 61, rtol=1e-5)


@pytest.mark.parametrize("assign", [SINKHORN, IPOT])
def test_a_row_of_nan_gets_no_mass_and_leaves_the_others_alone(assign):
    cost = _costs(6)
    broken = cost.copy()
    broken[3, 5] = np.nan
    plan = np.asarray(make_plan(broken, assign))
    assert (plan[3] == 0).all()
    expected = make_plan(np.delete(cost, 3, axis=0), assign)
    np.testing.assert_allclose(np.delete(plan, 3, axis=0), expected, rtol=1e-4, atol=1e-9)


def test_plan_of_a_sharded_batch_is_the_plan_of_the_whole_batch():
    cost = _costs(10, batch=64, codes=128)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    plan = jax.jit(lambda c: make_plan(c, SINKHORN), out_shardings=rows)
    sharded = plan(jax.device_put(cost, rows))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, make_plan(cost, SINKHORN), rtol=1e-4)


def test_no_gradient_passes_through_a_plan():
    cost = _costs(11)
    gradient = jax.grad(lambda c: jnp.sum(make_plan(c, SINKHORN) * cost))(cost)
    assert (np.asarray(gradient) == 0).all()
