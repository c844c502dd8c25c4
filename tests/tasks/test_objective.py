"""Every loss, both transport solvers and the gradient of their sum against the NumPy reference, in
both precisions.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from small_task import batch_of, drawing, saying, task_on

from codebook_jax.method import alignment, codebook
from codebook_jax.method.assignment import codeword_costs, ipot, make_plan, sinkhorn
from codebook_jax.method.masking import masked_word_loss
from codebook_jax.method.matching import matching_loss
from codebook_jax.method.queue import Queue
from codebook_jax.models.bert import taken
from codebook_jax.parallel import sharding
from codebook_jax.parallel.memory import equations
from codebook_jax.tasks.draws import Pair
from codebook_jax.tasks.state import Targets

ROWS, QUEUE, FILLED, DIM, CODES, WORDS = 7, 11, 5, 13, 17, 19
VALID = np.arange(QUEUE) < FILLED
UNKNOWN = -2  # no image's id
IMAGE_ID = np.array([3, 1, 3, 2, 3, 1, 0], np.int32)  # three texts of one image, two of another
SEEDS = range(4)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """The type of our arrays, and the tolerance of its results."""
    with jax.enable_x64(request.param == "float64"):
        yield SimpleNamespace(
            dtype=np.dtype(request.param), rtol={"float32": 1e-4, "float64": 1e-9}[request.param]
        )


def unit_rows(rng, precision, *shape):
    return reference.unit(rng.normal(size=shape)).astype(precision.dtype)


def pair_of(rng, precision, *shape):
    return Pair(unit_rows(rng, precision, *shape), unit_rows(rng, precision, *shape))


def assert_is(found, expected, precision):
    found = jax.tree.leaves(found)
    assert all(leaf.dtype == precision.dtype for leaf in found)
    for ours, theirs in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=precision.rtol)


# -- the losses


@functools.partial(jax.jit, static_argnames=("intra_weight", "same"))
def _aligned(student, teacher, queue, ids, *, intra_weight, **options):
    found = alignment.cross_entropies(student, teacher, queue, ids, **options)
    return alignment.alignment_loss(found, intra_weight=intra_weight)


@pytest.mark.parametrize("intra_weight", [0.0, 1.0])
@pytest.mark.parametrize("same_image", ["ignore", "negative"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_alignment_is_the_equation(with_ids, same_image, intra_weight, precision):
    ids = np.resize(IMAGE_ID, QUEUE) if with_ids else None
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        student, teacher, queue = (pair_of(rng, precision, n, DIM) for n in (ROWS, ROWS, QUEUE))
        temperature, alpha = precision.dtype.type([0.05 + 0.03 * seed, 0.2 * seed])
        found = _aligned(
            student._asdict(),
            teacher._asdict(),
            Queue(queue._asdict(), np.int32(0), np.int32(VALID.sum()), ids),
            IMAGE_ID,
            temperature=temperature,
            alpha=alpha,
            intra_weight=intra_weight,
            same=same_image,
        )
        queued = np.where(VALID, UNKNOWN if ids is None else ids, reference.EMPTY)
        given = teacher, queue, queued, IMAGE_ID
        of = dict(temperature=float(temperature), same_image=same_image)
        targets = reference.alignment_targets(*given, alpha=float(alpha), **of)
        expected = reference.alignment(student, *given, targets, intra_weight=intra_weight, **of)
        assert_is(found, expected, precision)


def test_each_loss_of_the_codebook_is_its_equation(precision):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        student, teacher = pair_of(rng, precision, ROWS, DIM), pair_of(rng, precision, ROWS, DIM)
        codes = unit_rows(rng, precision, CODES, DIM)
        q = Pair(*rng.dirichlet(np.full(CODES, 0.3), size=(2, ROWS)).astype(precision.dtype))
        given = student._asdict(), teacher._asdict(), codes, q._asdict()
        found = codebook.code_losses(*given, temperature=0.1)
        transport = sum(each.mean() for each in found.transport.values())
        predicted = [
            found.predicted[pair].mean() for pair in (("text", "image"), ("image", "text"))
        ]
        expected = reference.code_losses(student, teacher, codes, q, gamma=0.1)
        assert_is([transport, *predicted], expected, precision)


def test_matching_is_the_mean_cross_entropy_of_the_rows_that_count(precision):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        logits = 4 * rng.normal(size=(ROWS, 3, 2)).astype(precision.dtype)
        has_negative = rng.random(ROWS) < 0.7
        weights = np.stack([np.ones(ROWS), has_negative, has_negative], axis=1)
        found = matching_loss(
            logits.reshape(-1, 2),
            np.tile([True, False, False], ROWS),
            (weights / weights.sum()).ravel().astype(precision.dtype),
        )
        assert_is(found, reference.matching(logits, has_negative), precision)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_masked_words_mix_the_true_word_with_what_the_teacher_says(alpha, precision):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        logits, soft = 3 * rng.normal(size=(2, ROWS, 3, WORDS)).astype(precision.dtype)
        words = rng.integers(0, WORDS, (ROWS, 3))
        used = rng.random((ROWS, 3)) < 0.6
        weights = (used / used.sum()).astype(precision.dtype)
        found = masked_word_loss(logits, soft, words, weights, alpha=precision.dtype.type(alpha))
        expected = reference.masked_words(logits, soft, words, used, alpha=alpha)
        assert_is(found, expected, precision)
        if alpha == 0:
            assert masked_word_loss(logits, None, words, weights) == found


# -- transport


@functools.partial(jax.jit, static_argnames=("solver", "epsilon", "iterations", "ipot_beta"))
def _PLAN(cost, *, solver, epsilon, iterations, ipot_beta, valid=None):
    own = {"epsilon": epsilon} if solver == "sinkhorn" else {"beta": ipot_beta}
    assign = {"sinkhorn": sinkhorn, "ipot": ipot}[solver](iterations=iterations, **own)
    return make_plan(cost, assign, valid=valid)


# Three iterations are fewer than ott checks at once; with its default of ten it would silently run
# none.
@pytest.mark.parametrize("rows", [ROWS, 2 * CODES])
@pytest.mark.parametrize(
    ("solver", "iterations"), [("sinkhorn", 3), ("sinkhorn", 50), ("ipot", 3), ("ipot", 50)]
)
def test_plans_and_soft_codes_are_those_of_the_plain_loops(solver, iterations, rows, precision):
    options = dict(solver=solver, epsilon=0.05, iterations=iterations, ipot_beta=0.5)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        features = unit_rows(rng, precision, 2, rows, DIM)
        codes = unit_rows(rng, precision, CODES, DIM)
        cost = codeword_costs(features, codes)
        plan = _PLAN(cost, **options)
        expected = [
            reference.transport_plan(reference.costs(of_one, codes), **options)
            for of_one in features
        ]
        assert plan.dtype == precision.dtype
        # Relative down to what is nothing beside a codeword's share.
        close = functools.partial(
            np.testing.assert_allclose, rtol=precision.rtol, atol=1e-5 * precision.rtol
        )
        close(plan, expected)
        q = codebook.soft_codes(plan, ROWS)
        close(q, [reference.soft_codes(of_one, ROWS) for of_one in expected])


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
def test_rows_that_are_not_valid_are_as_if_they_were_not_there(solver, precision):
    options = dict(solver=solver, epsilon=0.05, iterations=20, ipot_beta=0.5)
    rng = np.random.default_rng(0)
    cost = codeword_costs(
        unit_rows(rng, precision, QUEUE, DIM), unit_rows(rng, precision, CODES, DIM)
    )
    valid = rng.random(QUEUE) < 0.6
    plan = np.asarray(_PLAN(cost, valid=valid, **options))
    expected = reference.transport_plan(np.asarray(cost)[valid], **options)
    np.testing.assert_allclose(
        plan[valid], expected, rtol=precision.rtol, atol=1e-5 * precision.rtol
    )
    assert (plan[~valid] == 0).all()


# -- the gradient


PARTS = (
    "towers/image/",
    "towers/text/",
    "towers/fusion/",
    "towers/image_projection/",
    "towers/text_projection/",
    "towers/masked_words/",
    "matching/",
    "codebook/",
    "temperature",
)
CHOICES = {
    "model.dtype": "float64",
    "itm.groups": 4,
    "codebook.queue_samples": 7,
    "teacher.alpha": 0.375,  # float32 has it
    "teacher.alpha_steps": 1,
}


def attention(query, key, value, *, key_value_seq_lengths=None, is_causal, implementation=None):
    """Softmax attention in the type of its arguments; jax.nn's always computes the softmax in
    float32.
    """
    assert not is_causal
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    if key_value_seq_lengths is not None:
        here = jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None]
        scores = jnp.where(here[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


def step_in_float64(task):
    """A state in the middle of a run, a batch, and its draws: only the noise chooses the
    negatives.
    """
    rng = np.random.default_rng(0)

    def random(path, leaf):
        return 0.3 * rng.normal(size=leaf.shape) + ("scale" in jax.tree_util.keystr(path))

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), task.abstract_state())
    student = jax.tree_util.tree_map_with_path(random, state.student)
    ring = reference.Ring(*state.queue.features["image"].shape)
    queued = np.arange(24, dtype=np.int32)  # images of the batch among them
    ring.enqueue(reference.unit(rng.normal(size=(2, 24, ring.rows.shape[2]))), queued)
    state = state.replace(
        step=np.int32(5),
        student=student | {"temperature": np.float64(0.07)},
        teacher=jax.tree_util.tree_map_with_path(random, state.teacher),
        queue=Queue(Pair(*ring.rows)._asdict(), *2 * [np.int32(ring.written)], np.int32(ring.ids)),
    )
    ids = np.array([0, 1, 2, 0, 4, 4, 4, 4, 8, 0, 10, 11, 12, 13, 12, 15], np.int32)
    batch = batch_of(0, image_id=ids)
    inputs = jax.device_get(drawing(task)(state.step, batch))
    weight = np.stack([np.ones(len(ids)), *2 * [inputs.allowed.any(axis=1)]], axis=1)
    inputs = inputs._replace(
        noise=jax.tree.map(lambda x: 1e6 * x, inputs.noise),
        match_weight=weight / weight.sum(),  # that of the draws is float32
    )
    return state, ring, batch, inputs


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(task, state, inputs, image_id):
    """The losses of a step and the gradient of their sum, combined as in the step."""
    taught = task.passes.over(functools.partial(task.teach, state.teacher), inputs)
    targets = Targets(taught.features, task.assign(taught.features, state), image_id)
    (loss, scalars), gradient = task.passes.gradients(
        task.objective(state, targets), state.student, inputs, taught, jax.random.key(0)
    )
    return {"loss": loss} | scalars, gradient


def reference_of(task, state, ring, batch, inputs):
    """The reference's losses as a function of the student only: choices made by `state.student` are
    fixed.
    """
    say = saying(task)

    def given(student):
        found = jax.device_get(say(student, state.teacher, batch, inputs.masked))
        own = dict(temperature=float(student["temperature"]), config=task.config)
        return found, own | {"codebook": student["codebook"]["codes"]}

    found, own = given(state.student)
    alpha = task.config.teacher.alpha
    decided = reference.decide(found, ring, batch.image_id, inputs.noise, alpha=alpha, **own)

    def losses(student):
        found, own = given(student)
        return reference.objective(found, decided, ring, batch.image_id, inputs.masked, **own)

    return losses


def directions(student, gradient):
    """Random directions of length one in the whole student and in each part, and single parameters
    of each part.
    """
    rng = np.random.default_rng(0)
    names = [name for name, leaf in sharding.named(student) for _ in range(leaf.size)]
    part = np.array([next(p for p in PARTS if name.startswith(p)) for name in names])
    for where in (np.ones(len(part), bool), *(part == p for p in PARTS)):
        direction = np.where(where, rng.normal(size=len(part)), 0)
        yield f"{where.sum()} at random", direction / np.linalg.norm(direction)
    for inside in (np.flatnonzero(part == p) for p in PARTS):
        largest = inside[np.argmax(np.abs(gradient[inside]))]
        assert abs(gradient[largest]) > 1e-3, names[largest]
        for place in {largest, *rng.choice(inside, 3)}:
            yield f"{names[place]}, entry {place}", np.arange(len(part)) == place


def test_gradient_of_the_objective_is_that_of_central_differences_of_the_reference(monkeypatch):
    with jax.enable_x64(True):
        in_one, in_two = (
            task_on(1, 1, 1, **CHOICES, **{"optimizer.accumulation": count}) for count in (1, 2)
        )
        state, ring, batch, inputs = step_in_float64(in_one)
        found = [
            jax.device_get(loss_and_gradient(task, state, inputs, batch.image_id))
            for task in (in_one, in_two)
        ]
        # The differences are of sums that float32 would blur, so only they have the attention that
        # does without.
        monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
        losses = reference_of(in_one, state, ring, batch, inputs)
        for name, loss in losses(state.student).items():
            for scalars, _ in found:
                np.testing.assert_allclose(scalars[name], loss, rtol=1e-7, err_msg=name)
        flat, rebuild = ravel_pytree(state.student)
        gradients = [np.asarray(ravel_pytree(gradient)[0]) for _, gradient in found]
        assert all(leaf.dtype == np.float64 for leaf in (flat, *gradients))
        for name, direction in directions(state.student, gradients[0]):
            up, down = (losses(rebuild(flat + h * direction))["loss"] for h in (1e-5, -1e-5))
            for gradient in gradients:
                np.testing.assert_allclose(
                    gradient @ direction, (up - down) / 2e-5, rtol=1e-5, atol=1e-8, err_msg=name
                )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_reading_rows_adds_them_where_they_came_from(dtype):
    draw = np.random.default_rng(0)
    places = draw.integers(0, 3, (2, 6))  # of 7 rows: some are read often, some never
    x, pull = (draw.normal(size=(2, rows, 5)).astype(dtype) for rows in (7, 6))
    found, back = jax.vjp(lambda x: taken(x, jnp.asarray(places)), jnp.asarray(x))
    np.testing.assert_array_equal(found, np.stack([x[b, places[b]] for b in range(2)]))
    expected = np.zeros(x.shape, np.float64)
    for b in range(2):
        np.add.at(expected[b], places[b], pull[b].astype(np.float64))
    rtol = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    (back,) = back(jnp.asarray(pull))
    np.testing.assert_allclose(np.asarray(back, np.float64), expected, rtol=rtol)
    lengths = np.arange(14, dtype=np.int32).reshape(2, 7)
    assert taken(jnp.asarray(lengths), jnp.asarray(places)).dtype == np.int32


def float_sums_by_place(jaxpr):
    """Shapes of the float arrays that a program adds to entry by entry."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scatter-add" and eqn.outvars[0].aval.dtype.kind == "f":
            yield eqn.outvars[0].aval.shape


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1)])
def test_a_step_adds_floats_by_place_for_word_embeddings_alone(sizes):
    """On a GPU such sums are atomic, in another order each time."""
    task = task_on(*sizes)
    step = task.step.trace(task.abstract_state(), task.abstract_batch())
    words = task.abstract_state().student["towers"]["text"]["words"].shape
    counts = 2, task.config.codebook.size  # whole numbers, which are exact in any order
    assert sorted(float_sums_by_place(step.jaxpr.jaxpr)) == sorted([words, counts])
