"""Assignments against POT's plans, NumPy's loops, and what each is to do in corners."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ott.tools.k_means import k_means
from scipy.special import logsumexp

from codebook_jax import method

POT = np.load(Path(__file__).parent.parent / "goldens" / "plans.npz")
EPSILON, TAU = float(POT["epsilon"]), float(POT["tau"])
ALL = {
    "sinkhorn": method.sinkhorn(),
    "ipot": method.ipot(),
    "swav": method.swav(),
    "unbalanced": method.unbalanced(),
    "nearest": method.nearest(),
    "softmax": method.softmax(),
}


def unit_rows(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["sinkhorn", "unbalanced"])
def test_plans_are_those_of_pot(name):
    options = {"tau": TAU} if name == "unbalanced" else {}
    assign = getattr(method, name)(epsilon=EPSILON, iterations=2000, **options)
    plan = method.make_plan(jnp.asarray(POT["cost"], jnp.float32), assign)
    assert np.abs(np.asarray(plan) - POT[name]).sum() < 1e-5
    assert (np.abs(POT["unbalanced"].sum(0) - 0.1) > 0.01).any()  # not the balanced problem


def test_ipot_tends_to_the_exact_transport_of_pot():
    costs = [
        float(np.sum(method.make_plan(POT["cost"], method.ipot(iterations=n)) * POT["cost"]))
        for n in (50, 500, 5000)
    ]
    above = np.array(costs) - POT["emd2"]
    assert above[0] > above[1] > abs(above[2]) and abs(above[2]) < 1e-5


def test_unbalanced_with_all_its_pull_is_sinkhorn():
    cost = jnp.asarray(POT["cost"], jnp.float32)
    given = dict(epsilon=EPSILON, iterations=50)
    plans = [method.make_plan(cost, of) for of in (method.unbalanced(tau=1, **given),
                                                   method.sinkhorn(**given))]  # fmt: skip
    np.testing.assert_array_equal(*plans)


@pytest.mark.parametrize("iterations", [1, 3])
def test_swav_is_its_sweeps_in_the_log_domain_and_says_what_it_leaves(iterations):
    cost = POT["cost"]
    log_q = -cost / EPSILON
    for _ in range(iterations):
        log_q = log_q - logsumexp(log_q, axis=0, keepdims=True) - np.log(cost.shape[1])
        log_q = log_q - logsumexp(log_q, axis=1, keepdims=True) - np.log(cost.shape[0])
    assign = method.swav(epsilon=EPSILON, iterations=iterations)
    plan = method.make_plan(jnp.asarray(cost, jnp.float32), assign)
    np.testing.assert_allclose(plan, np.exp(log_q), rtol=1e-5)
    left = np.abs(np.exp(log_q).sum(0) - 1 / cost.shape[1]).sum()
    np.testing.assert_allclose(method.column_error(plan), left, rtol=1e-3)


def test_softmax_is_the_centred_soft_code_and_its_centre_a_running_mean():
    cost, center = POT["cost"], np.linspace(-0.2, 0.3, POT["cost"].shape[1])
    logits = (1 - cost - center) / 0.1
    expected = np.exp(logits - logsumexp(logits, axis=1, keepdims=True)) / len(cost)
    assign = method.softmax(temperature=0.1, center=jnp.asarray(center, jnp.float32))
    np.testing.assert_allclose(method.make_plan(cost, assign), expected, rtol=1e-4)
    valid = np.arange(len(cost)) % 3 > 0
    after = method.update_center(jnp.asarray(center), cost, momentum=0.9, valid=valid)
    np.testing.assert_allclose(after, 0.9 * center + 0.1 * (1 - cost[valid]).mean(0), rtol=1e-5)


def test_nearest_with_running_codes_is_spherical_k_means_of_numpy():
    """Whole batches and decay 0 make the running means Lloyd's; started by ott's k-means++."""
    features = unit_rows(0, 300, 5).astype(np.float32)
    start = k_means(jnp.asarray(features), k=7, rng=jax.random.key(0), max_iterations=1).centroids
    running = method.running_codes(start)
    codes = np.asarray(method.unit(start), np.float64)
    for _ in range(8):
        plan = method.make_plan(method.codeword_costs(features, running.codes), method.nearest())
        counts = len(features) * plan.sum(0)
        sums = len(features) * plan.T @ features
        running = method.update_codes(running, sums, counts, 0.0)
        chosen = (features.astype(np.float64) @ codes.T).argmax(1)
        np.testing.assert_array_equal(plan.argmax(1), chosen)
        for k in set(chosen):
            mean = features[chosen == k].mean(0)
            codes[k] = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(running.codes, codes, atol=1e-5)


def test_running_codes_are_the_averages_of_vq_vae():
    rng = np.random.default_rng(0)
    codes = unit_rows(1, 3, 4)
    size, total = np.ones(3), codes.copy()
    running = method.running_codes(jnp.asarray(codes, jnp.float32))
    for _ in range(5):
        counts = np.array([2.0, 0.0, rng.integers(1, 9)])
        sums = rng.normal(size=(3, 4)) * (counts > 0)[:, None]
        running = method.update_codes(running, sums, counts, 0.8)
        size, total = 0.8 * size + 0.2 * counts, 0.8 * total + 0.2 * sums
    np.testing.assert_allclose(running.means, total / size[:, None], rtol=1e-4)
    np.testing.assert_array_equal(running.idle, [0, 5, 0])


def test_unused_codes_move_to_the_features_served_worst():
    codes = jnp.eye(4, 3)  # the last is nowhere
    running = method.running_codes(codes).replace(idle=jnp.array([0, 7, 3, 9]))
    features = jnp.array([[1.0, 0, 0], [-1, 0, 0], [0.6, 0, -0.8], [jnp.nan, 0, 0]])
    moved = method.move_unused(running, features, method.codeword_costs(features, codes), window=7)
    np.testing.assert_allclose(moved.codes, [[1, 0, 0], features[1], [0, 0, 1], features[2]])
    np.testing.assert_array_equal(moved.idle, [0, 0, 3, 0])


@pytest.mark.parametrize("name", ALL)
def test_every_assignment_gives_each_row_its_mass_and_a_bad_row_none(name):
    cost = np.asarray(POT["cost"], np.float32).copy()
    cost[3] = np.nan
    valid = np.arange(len(cost)) != 5
    plan = np.asarray(method.make_plan(cost, ALL[name], valid=valid))
    here = valid & (np.arange(len(cost)) != 3)
    np.testing.assert_allclose(plan.sum(1), here / here.sum(), rtol=1e-5)
    alone = method.make_plan(cost[here], ALL[name])
    np.testing.assert_allclose(plan[here], alone, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(method.make_plan(cost[:1, :1], ALL[name]), [[1]])  # N = K = 1
    assert np.all(np.asarray(method.make_plan(cost, ALL[name], valid=np.zeros(24, bool))) == 0)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (method.sinkhorn, {"epsilon": 0.0}, "epsilon=0.0"),
        (method.swav, {"iterations": 0}, "iterations=0"),
        (method.ipot, {"beta": -1.0}, "beta=-1.0"),
        (method.unbalanced, {"tau": 1.5}, "tau=1.5"),
        (method.softmax, {"temperature": 0}, "temperature=0"),
    ],
)
def test_an_option_out_of_range_is_refused(make, options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)
