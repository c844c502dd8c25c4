"""Alignment against loops in float64, POT's plans, and stories whose order is known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ott.geometry import costs
from scipy.optimize import linprog
from scipy.special import logsumexp

from codebook_jax.method import ordering
from codebook_jax.method.ordering import (
    Order,
    carry,
    order_costs,
    sequence_similarities,
    sequence_similarity,
)

align_steps = jax.jit(ordering.align_steps, static_argnames=("order", "epsilon"))

GOLDEN = Path(__file__).parents[1] / "goldens" / "alignments.npz"
ENOUGH = 3000  # iterations after which nothing changes


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def _unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _cost(z_n, z_m):
    return 1 - np.einsum("bnd,bmd->bnm", z_n, z_m)


def _ones(*shape):
    return jnp.ones(shape, bool)


def _authors_plan(distance, order):
    """K = P exp((S - D) / lambda2) with the Gaussian P, scaled by turns, in logarithms."""
    n, m = distance.shape
    log_kernel = np.zeros((n, m))
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            off_diagonal = abs(i / n - j / m) / np.sqrt(1 / n**2 + 1 / m**2)
            log_p = -(off_diagonal**2) / (2 * order.width**2)
            log_p -= np.log(order.width * np.sqrt(2 * np.pi))
            similar_place = order.locality / ((i / n - j / m) ** 2 + 1)
            distant = distance[i - 1, j - 1]
            log_kernel[i - 1, j - 1] = log_p + (similar_place - distant) / order.spread
    log_a, log_b = np.zeros(n), np.zeros(m)
    for _ in range(order.iterations):
        log_a = [-np.log(n) - logsumexp(log_kernel[i] + log_b) for i in range(n)]
        log_b = [-np.log(m) - logsumexp(log_kernel[:, j] + log_a) for j in range(m)]
    log_a = [-np.log(n) - logsumexp(log_kernel[i] + log_b) for i in range(n)]
    return np.exp(np.array(log_a)[:, None] + log_kernel + np.array(log_b)[None, :])


@pytest.mark.parametrize("iterations", [1, 30])
def test_ragged_plans_are_the_authors(golden, iterations):
    order = Order(locality=0.7, spread=0.2, width=0.8, iterations=iterations)
    cost, valid_n, valid_m = golden["cost"], golden["valid_n"], golden["valid_m"]
    plan = align_steps(cost, order, valid_n, valid_m)
    assert plan.dtype == jnp.float64
    for sample in range(len(cost)):
        place = np.ix_(valid_n[sample], valid_m[sample])
        expected = np.zeros(cost[sample].shape)
        expected[place] = _authors_plan(cost[sample][place], order)
        np.testing.assert_allclose(plan[sample], expected, atol=1e-12)
        np.testing.assert_allclose(
            plan[sample].sum(1), valid_n[sample] / valid_n[sample].sum(), rtol=1e-14
        )


def test_costs_and_plans_are_pots(golden):
    cost, valid_n, valid_m = golden["cost"], golden["valid_n"], golden["valid_m"]
    locality, spread, width, slack = golden["order"].tolist()
    order = Order(locality, spread, width, iterations=ENOUGH)
    both = valid_n[:, :, None] & valid_m[:, None, :]
    costs = order_costs(cost, order, valid_n, valid_m)
    np.testing.assert_allclose(np.where(both, costs, 0), golden["costs"], atol=1e-12)
    for plan, name in (
        (align_steps(cost, order, valid_n, valid_m), "ordered"),
        (align_steps(cost, None, valid_n, valid_m, epsilon=spread), "bag"),
        (align_steps(cost, order._replace(slack=slack), valid_n, valid_m), "dummies"),
    ):
        np.testing.assert_allclose(plan, golden[name], atol=1e-10, err_msg=name)


def test_slack_matches_as_much_as_pots_partial_transport(golden):
    cost, valid_n, valid_m = golden["cost"], golden["valid_n"], golden["valid_m"]
    locality, spread, width, slack = golden["order"].tolist()
    plan = align_steps(cost, Order(locality, spread, width, slack), valid_n, valid_m)
    np.testing.assert_allclose(plan.sum((1, 2)), golden["partial"].sum((1, 2)), rtol=1e-9)
    for axis, valid in ((2, valid_n), (1, valid_m)):
        assert (plan.sum(axis) <= valid / valid.sum(1, keepdims=True) + 1e-6).all()


def test_slack_tends_to_the_partial_linear_programme_as_spread_falls():
    n, m, slack = 6, 5, 0.6
    order = Order(spread=2e-3, slack=slack, iterations=ENOUGH)
    cost = np.random.default_rng(1).uniform(0, 2, (1, n, m))
    costs = np.asarray(order_costs(cost, order, _ones(1, n), _ones(1, m)))[0].ravel()
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    most = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    best = linprog(costs, A_ub=sums, b_ub=most, A_eq=np.ones((1, n * m)), b_eq=[slack]).fun
    plan = np.asarray(align_steps(cost, order, _ones(1, n), _ones(1, m)))
    np.testing.assert_allclose(plan.sum(), slack, rtol=1e-6)
    np.testing.assert_allclose((plan.ravel() * costs).sum(), best, atol=5e-3)


def test_slack_leaves_sentences_that_speak_of_nothing_shown_unmatched():
    rng = np.random.default_rng(2)
    frames = _unit(rng, 50, 6, 32)
    sentences = np.concatenate([frames[:, :3], _unit(rng, 50, 2, 32), frames[:, 3:]], axis=1)
    cost = _cost(frames, sentences)
    for slack, most in ((1.0, 1.0), (0.75, 0.2)):
        plan = align_steps(cost, Order(slack=slack), _ones(50, 6), _ones(50, 8))
        share = 8 * plan.sum(1)  # of each sentence's own mass
        assert (share[:, 3:5] <= most + 1e-3).all() and (share[:, [0, 1, 2, 5, 6, 7]] > 0.85).all()


def test_what_is_masked_or_not_a_number_changes_nothing_else():
    rng = np.random.default_rng(3)
    z_n, z_m, q = _unit(rng, 2, 5, 7), _unit(rng, 2, 4, 7), rng.dirichlet(np.ones(3), (2, 5))
    for order in (Order(), Order(slack=0.8), None):
        clean = align_steps(_cost(z_n, z_m), order, _ones(2, 5), _ones(2, 4))
        expected = carry(clean, q), sequence_similarity(z_n, z_m, clean)
        for by_mask in (True, False):
            # a bad step in the middle of both sides, and a padding of garbage
            n, m, codes = (
                np.insert(part, [2, 5], np.nan, 1) for part in (z_n, np.insert(z_m, 4, 0, 1), q)
            )
            valid_n, valid_m = np.ones((2, 7), bool), np.ones((2, 7), bool)
            valid_m[:, 5] = False
            if by_mask:
                valid_n[:, [2, 6]], valid_m[:, [2, 6]] = False, False
            plan = align_steps(_cost(n, m), order, valid_n, valid_m)
            kept = np.ix_([0, 1], [0, 1, 3, 4, 5], [0, 1, 3, 4])
            np.testing.assert_allclose(plan[kept], clean, atol=1e-14)
            np.testing.assert_allclose(plan.sum(), clean.sum(), rtol=1e-12)
            carried = carry(plan, codes)
            np.testing.assert_allclose(carried[:, [0, 1, 3, 4]], expected[0], atol=1e-12)
            assert (carried[:, [2, 5, 6]] == 0).all()
            np.testing.assert_allclose(sequence_similarity(n, m, plan), expected[1], atol=1e-14)


@pytest.mark.parametrize("order", [Order(), Order(slack=0.5), None])
def test_a_sequence_without_steps_gives_zeros(order):
    cost = np.random.default_rng(4).uniform(0, 2, (3, 4, 5))
    valid_n, valid_m = np.ones((3, 4), bool), np.ones((3, 5), bool)
    valid_n[0] = valid_m[1] = False
    cost[2] = np.nan
    plan = align_steps(cost, order, valid_n, valid_m)
    assert (np.asarray(plan) == 0).all()
    assert (np.asarray(carry(plan, np.ones((3, 4, 2)))) == 0).all()


def test_one_step_each_is_a_pair():
    rng = np.random.default_rng(5)
    for kind in (np.float32, np.float64):
        z_n, z_m = _unit(rng, 11, 1, 16).astype(kind), _unit(rng, 11, 1, 16).astype(kind)
        q = rng.dirichlet(np.ones(13), (11, 1)).astype(kind)
        plan = align_steps(_cost(z_n, z_m), Order(), _ones(11, 1), _ones(11, 1))
        assert plan.dtype == kind and (np.asarray(plan) == 1).all()
        np.testing.assert_array_equal(carry(plan, q), q)
        cosine = np.einsum("bnd,bnd->b", z_n.astype(np.float64), z_m)
        np.testing.assert_allclose(
            sequence_similarity(z_n, z_m, plan), cosine, atol=4 * np.finfo(kind).eps
        )


def test_one_step_meets_all_of_forty():
    q = np.random.default_rng(6).dirichlet(np.ones(3), (2, 1))
    plan = align_steps(np.ones((2, 1, 40)), Order(), _ones(2, 1), _ones(2, 40))
    np.testing.assert_allclose(plan, 1 / 40, rtol=1e-12)
    np.testing.assert_allclose(carry(plan, q), np.repeat(q, 40, 1), rtol=1e-12)
    np.testing.assert_allclose(carry(plan.mT, np.repeat(q, 40, 1)), q, rtol=1e-12)


def test_ordered_alignment_tells_a_story_from_its_shuffle():
    rng, stories, steps = np.random.default_rng(7), 200, 6
    z_v = _unit(rng, stories, steps, 32)
    told = z_v + 0.15 * rng.normal(size=z_v.shape)  # a cosine of about 0.76 to its frame
    told /= np.linalg.norm(told, axis=-1, keepdims=True)
    swaps = np.stack([rng.permutation(steps) for _ in range(stories)])
    in_order = (swaps == np.arange(steps)).all(1)
    swaps[in_order] = np.arange(steps)[::-1]
    shuffled = np.take_along_axis(told, swaps[..., None], 1)

    def lead_of(order):
        scores = []
        for text in (told, shuffled):
            plan = align_steps(
                _cost(z_v, text), order, _ones(stories, steps), _ones(stories, steps)
            )
            scores.append(np.asarray(sequence_similarity(z_v, text, plan)))
        return scores[0] - scores[1]

    ordered, bag = lead_of(Order()), lead_of(None)
    wins = [np.mean((lead > 1e-12) + 0.5 * (abs(lead) <= 1e-12)) for lead in (ordered, bag)]
    print("the story beats its shuffle: ordered {:.1%}, as a bag {:.1%}".format(*wins))
    assert np.mean(ordered > 0) >= 0.9
    np.testing.assert_allclose(bag, 0, atol=1e-12)  # a tie, but for rounding
    pooled = z_v.mean(1) * (told.mean(1) - shuffled.mean(1))
    np.testing.assert_allclose(pooled.sum(-1), 0, atol=1e-12)


def test_soft_dtw_of_ott_is_of_the_same_mind_on_who_tells_whom():
    """Its alignment is the gradient of its value by the costs (Cuturi & Blondel 2017)."""
    rng, stories, frames, sentences = np.random.default_rng(9), 100, 6, 5
    z_v = _unit(rng, stories, frames, 32)
    told = np.sort(rng.random((stories, frames)).argsort(axis=1)[:, :sentences], axis=1)
    z_t = np.take_along_axis(z_v, told[..., None], 1)
    z_t = z_t + 0.15 * rng.normal(size=z_t.shape)
    cost = _cost(z_v, z_t / np.linalg.norm(z_t, axis=-1, keepdims=True))

    class Given(costs.SqEuclidean):
        def __init__(self, matrix):
            self.matrix = matrix

        def all_pairs(self, x, y):
            return self.matrix

    nothing = jnp.zeros(1)
    value = lambda matrix: costs.SoftDTW(0.1, Given(matrix))(nothing, nothing)  # noqa: E731
    theirs = np.asarray(jax.jit(jax.vmap(jax.grad(value)))(cost)).argmax(axis=1)
    ours = align_steps(cost, Order(), _ones(stories, frames), _ones(stories, sentences))
    ours = np.asarray(ours).argmax(axis=1)
    print(f"agreement {(ours == theirs).mean():.1%}, right: ours {(ours == told).mean():.1%}, "
          f"soft-DTW {(theirs == told).mean():.1%}")  # fmt: skip
    assert (ours == theirs).mean() >= 0.9  # soft-DTW has no steps that match nothing
    assert (ours == told).mean() >= (theirs == told).mean()


def test_gradients_are_central_differences_at_a_fixed_plan():
    rng = np.random.default_rng(8)
    z_n, z_m, step = _unit(rng, 2, 4, 3), _unit(rng, 2, 5, 3), 1e-6
    valid_n, valid_m = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool), _ones(2, 5)
    fixed = align_steps(_cost(z_n, z_m), Order(), valid_n, valid_m)
    similarity = jax.jit(lambda n, m: sequence_similarity(n, m, fixed).sum())

    def aligned(n, m):
        cost = 1 - jnp.einsum("bnd,bmd->bnm", n, m)
        return sequence_similarity(n, m, align_steps(cost, Order(), valid_n, valid_m)).sum()

    for side, gradient in enumerate(jax.grad(aligned, (0, 1))(z_n, z_m)):
        for place in np.ndindex(gradient.shape):
            up, down = [z_n.copy(), z_m.copy()], [z_n.copy(), z_m.copy()]
            up[side][place] += step
            down[side][place] -= step
            slope = (similarity(*up) - similarity(*down)) / (2 * step)
            np.testing.assert_allclose(gradient[place], slope, atol=1e-8)


def test_all_pairs_are_each_pair_jitted_and_mapped():
    rng = np.random.default_rng(9)
    z_a, z_b = _unit(rng, 3, 6, 8), _unit(rng, 4, 5, 8)
    valid_a, valid_b = rng.random((3, 6)) < 0.7, rng.random((4, 5)) < 0.7
    found = jax.jit(lambda *z: sequence_similarities(*z, Order(slack=0.9), valid_a, valid_b))(
        z_a, z_b
    )

    def one(z_n, valid_n, z_m, valid_m):
        plan = align_steps((1 - z_n @ z_m.T)[None], Order(slack=0.9), valid_n[None], valid_m[None])
        return sequence_similarity(z_n[None], z_m[None], plan)[0]

    over_b = jax.vmap(one, (None, None, 0, 0))
    expected = jax.vmap(over_b, (0, 0, None, None))(z_a, valid_a, z_b, valid_b)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_bfloat16_is_computed_in_float32():
    z = jnp.asarray(_unit(np.random.default_rng(10), 2, 6, 8), jnp.bfloat16)
    cost = 1 - jnp.einsum("bnd,bmd->bnm", z, z)
    plan = align_steps(cost, Order(spread=0.01), _ones(2, 6), _ones(2, 6))
    for found in (
        plan,
        carry(plan, jax.nn.softmax(z)),
        sequence_similarity(z, z, plan),
        sequence_similarities(z, z, Order(slack=0.7), _ones(2, 6), _ones(2, 6)),
    ):
        assert found.dtype == jnp.float32 and jnp.isfinite(found).all()


@pytest.mark.parametrize(
    ("field", "value"), [("spread", 0.0), ("width", -1.0), ("slack", 1.5), ("iterations", 0)]
)
def test_an_order_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"order.{field}={value}"):
        align_steps(
            np.ones((1, 2, 3)), Order()._replace(**{field: value}), _ones(1, 2), _ones(1, 3)
        )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"valid_m \(1, 2\).*\(1, 2, 3\)"):
        align_steps(np.ones((1, 2, 3)), Order(), _ones(1, 2), _ones(1, 2))
    with pytest.raises(ValueError, match=r"codes_q \(1, 3, 4\).*\(1, 2, 3\)"):
        carry(jnp.ones((1, 2, 3)), jnp.ones((1, 3, 4)))
