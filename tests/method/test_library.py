"""The objective as others call it: any number of named modalities, masks, sequences, errors."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import log_softmax

from codebook_jax import method

BATCH, DIM, CODES = 16, 5, 9
ASSIGN = method.sinkhorn(iterations=20)


def features(seed, *names, shape=(BATCH, DIM), dtype=np.float32):
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape).astype(dtype) for name in names}


def codes_of(seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(CODES, DIM)).astype(dtype)


def aligned(student, codes, order=None, **arrays):
    return _aligned(student, codes, arrays, order=order)


@functools.partial(jax.jit, static_argnames="order")
def _aligned(student, codes, arrays, *, order):
    return method.codebook_alignment(student, codes, assign=ASSIGN, order=order, **arrays)


_instance = jax.jit(method.instance_alignment, static_argnames=("intra_weight", "same"))


def one_loss(loss, student, other):
    if loss == "codebook":
        return aligned(student, codes_of(9, np.float32), teacher=other)
    if loss == "clip":
        return _instance(student, intra_weight=0)
    return _instance(student, other, temperature=0.2, alpha=0.3)


# -- values


def test_two_modalities_are_the_equations_of_codis():
    with jax.enable_x64(True):
        student, teacher = (features(s, "image", "text", dtype=np.float64) for s in (0, 1))
        codes = codes_of(2, np.float64)
        loss, aux = jax.device_get(aligned(student, codes, teacher=teacher))
        z, taught = ([reference.unit(part[n]) for n in student] for part in (student, teacher))
        of = dict(epsilon=0.05, iterations=20, solver="sinkhorn", ipot_beta=0.5)
        costs = [reference.costs(each, reference.unit(codes)) for each in taught]
        q = [reference.soft_codes(reference.transport_plan(c, **of), BATCH) for c in costs]
        parts = reference.code_losses(z, taught, reference.unit(codes), q, gamma=0.1)
    np.testing.assert_allclose(loss, sum(parts), rtol=1e-9)
    np.testing.assert_allclose(aux.per_sample.mean(), loss, rtol=1e-9)
    np.testing.assert_allclose(aux.predicted["image to text"], parts.image_to_code, rtol=1e-9)


def test_three_modalities_are_the_mean_over_their_pairs_at_the_scale_of_two():
    three, codes = features(0, "a", "b", "c"), codes_of(1)
    loss, aux = aligned(three, codes)
    assert set(aux.predicted) == {f"{a} to {b}" for a, b in itertools.permutations("abc", 2)}
    twos = itertools.combinations("abc", 2)
    pairs = [aligned({n: three[n] for n in two}, codes)[0] for two in twos]
    np.testing.assert_allclose(loss, np.mean(pairs), rtol=1e-5)
    np.testing.assert_allclose(aux.per_sample.mean(), loss, rtol=1e-5)


def test_instance_alignment_without_teacher_within_or_queue_is_clip_s():
    both = features(0, "image", "text")
    image, text = (reference.unit(x.astype(np.float64)) for x in both.values())
    logits = image @ text.T / 0.07
    clip = -np.mean([np.diag(log_softmax(logits, axis=axis)).mean() for axis in (0, 1)])
    loss, aux = _instance(both, intra_weight=0)
    np.testing.assert_allclose(loss, clip, rtol=1e-5)
    np.testing.assert_allclose(aux.per_sample.mean(), clip, rtol=1e-5)


def test_without_teacher_candidates_learn_too_and_with_one_they_do_not():
    with jax.enable_x64(True):
        z = features(0, "image", "text", dtype=np.float64)
        clip = jax.jit(lambda z: method.instance_alignment(z, intra_weight=0)[0])
        way = features(1, "image", "text", dtype=np.float64)
        slope = (clip(moved(z, way, 1e-5)) - clip(moved(z, way, -1e-5))) / 2e-5
        gradient = jax.jit(jax.grad(clip))(z)
        np.testing.assert_allclose(sum(np.sum(gradient[n] * way[n]) for n in z), slope, rtol=1e-6)
    taught = jax.jit(jax.grad(lambda z, t: method.instance_alignment(z, t)[0], 1))(z, z)
    assert all(np.all(np.asarray(part) == 0) for part in taught.values())


def moved(z, way, step):
    return {name: each + step * way[name] for name, each in z.items()}


def test_the_queue_and_ids_change_what_a_sample_is_compared_with():
    both = features(0, "image", "text")
    queue = method.empty_queue(tuple(both), size=32, dim=DIM)
    plain, _ = _instance(both, both, queue=queue)  # nothing in it yet
    assert plain == _instance(both, both)[0]
    queue = method.enqueue(queue, features(1, "image", "text"))
    assert _instance(both, both, queue=queue)[0] > plain
    twins = np.arange(BATCH) // 2
    assert _instance(both, both, ids=twins)[0] < plain
    same = _instance(both, both, ids=twins, same="negative")[0]
    np.testing.assert_allclose(same, plain, rtol=1e-6)


# -- sequences


def test_sequences_of_one_step_are_plain_features():
    student, teacher, codes = features(0, "a", "b"), features(1, "a", "b"), codes_of(2)
    one_step = [{n: x[:, None] for n, x in part.items()} for part in (student, teacher)]

    def of(z, taught, order=None):
        def loss(z, codes):
            return aligned(z, codes, teacher=taught, order=order)[0]

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(z, codes)

    plain = jax.tree.leaves(of(student, teacher))
    for order in (None, method.Order()):
        for found, expected in zip(jax.tree.leaves(of(*one_step, order)), plain, strict=True):
            np.testing.assert_allclose(
                found.reshape(expected.shape), expected, atol=2e-7, rtol=2e-6
            )


@pytest.mark.parametrize("slack", [1.0, 0.6])
def test_codes_are_carried_over_the_alignment_as_in_loops(slack):
    """With slack, a step counts by the share of its mass that is matched."""
    lengths = {"frames": [4, 2, 3], "words": [2, 5, 5]}
    shapes = {"frames": (3, 4, DIM), "words": (3, 5, DIM)}
    student, teacher = (
        {n: features(seed, n, shape=shape)[n] for n, shape in shapes.items()} for seed in (0, 1)
    )
    valid = {n: np.arange(student[n].shape[1]) < np.array(lengths[n])[:, None] for n in lengths}
    codes = codes_of(2)
    order = method.Order(slack=slack)
    loss, aux = aligned(student, codes, teacher=teacher, valid=valid, order=order)
    unit_codes = reference.unit(codes.astype(np.float64))
    total = 0
    for a, b in itertools.permutations(("frames", "words")):
        of_stories = []
        for story in range(3):
            n, m = lengths[a][story], lengths[b][story]
            plan = np.asarray(aux.alignments["frames to words"][story], np.float64)
            plan = (plan if a == "frames" else plan.T)[:n, :m]
            q = np.asarray(aux.assignments[b][story], np.float64)[:m]
            log_p = log_softmax(reference.unit(student[a][story, :n]) @ unit_codes.T / 0.1, axis=1)
            steps = []
            for i in range(n):
                target = sum(plan[i, j] * q[j] for j in range(m)) / plan[i].sum()
                share = min(1, n * plan[i].sum())
                steps.append(-share * (target * log_p[i]).sum())
            of_stories.append(np.mean(steps))
        np.testing.assert_allclose(aux.predicted[f"{a} to {b}"], np.mean(of_stories), rtol=1e-4)
        total += np.mean(of_stories)
    np.testing.assert_allclose(loss, total + sum(aux.transport.values()), rtol=1e-4)


# -- masks, and what is not finite


@pytest.mark.parametrize("size", [1e30, 1e-25])
def test_features_and_codes_may_be_as_large_or_small_as_floats_are(size):
    student, codes = features(0, "a", "b"), codes_of(1)
    expected, _ = aligned(student, codes)
    other = {name: size * each for name, each in student.items()}
    found, aux = aligned(other, size * codes)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not any(aux.dropped.values())


def test_a_mask_of_numbers_is_one_of_truths():
    student, codes = features(0, "a", "b"), codes_of(1)
    mask = np.arange(len(student["a"])) % 3
    expected, _ = aligned(student, codes, valid={"a": mask > 0})
    found, _ = aligned(student, codes, valid={"a": mask.astype(np.float32)})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("steps", [(), (3,)])
def test_rows_that_are_not_there_or_not_finite_are_as_if_left_out(steps):
    shape = (BATCH, *steps, DIM)
    student, teacher = features(0, "a", "b", shape=shape), features(1, "a", "b", shape=shape)
    kept = np.arange(BATCH) != 3
    expected, _ = aligned(*[{n: x[kept] for n, x in student.items()}, codes_of(2)],
                          teacher={n: x[kept] for n, x in teacher.items()})  # fmt: skip
    masks = {n: np.broadcast_to(kept.reshape(-1, *[1] * len(steps)), shape[:-1]) for n in student}
    masked, _ = aligned(student, codes_of(2), teacher=teacher, valid=masks)
    np.testing.assert_allclose(masked, expected, rtol=1e-5)
    broken = {n: x.copy() for n, x in student.items()}
    broken["a"][3], broken["b"][3] = np.nan, np.inf
    loss = lambda z: aligned(z, codes_of(2), teacher=teacher)  # noqa: E731
    (found, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(broken)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert int(aux.dropped["a"]) == max(1, *steps, 0) and aux.per_sample[3] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_instance_alignment_leaves_out_a_row_that_is_not_finite():
    student, teacher = features(0, "a", "b"), features(1, "a", "b")
    kept = np.arange(BATCH) != 3
    left = [{n: x[kept] for n, x in part.items()} for part in (student, teacher)]
    for part in (student, teacher):
        for each in part.values():
            each[3] = np.nan
    found, aux = _instance(student, teacher)
    np.testing.assert_allclose(found, _instance(*left)[0], rtol=1e-5)
    assert aux.dropped == {"a": 1, "b": 1}


def test_a_wholly_masked_sequence_counts_nothing_and_codes_not_finite_give_nan():
    both = features(0, "a", "b", shape=(BATCH, 3, DIM))
    valid = {"a": np.ones((BATCH, 3), bool), "b": np.ones((BATCH, 3), bool)}
    valid["b"][2] = False
    loss, aux = aligned(both, codes_of(1), valid=valid, order=method.Order())
    assert np.isfinite(loss) and np.all(aux.alignments["a to b"][2] == 0)
    codes = codes_of(1)
    codes[4, 0] = np.nan
    assert np.isnan(aligned(features(0, "a", "b"), codes)[0])


def test_one_row_and_one_code_are_no_special_case():
    one = features(0, "a", "b", shape=(1, DIM))
    loss, aux = aligned(one, codes_of(1)[:1])
    assert np.isfinite(loss) and aux.perplexity == {"a": 1, "b": 1}
    assert _instance(one, intra_weight=0)[0] == 0


# -- transformations and devices


@pytest.mark.parametrize("loss", ["codebook", "instance", "clip"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_give_the_loss_and_gradient_of_one(loss, kind):
    student, teacher = features(0, "a", "b"), features(1, "a", "b")
    of = jax.value_and_grad(lambda z, taught: one_loss(loss, z, taught)[0])
    expected = jax.jit(of)(student, teacher)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        found = jax.jit(of)(*jax.device_put((student, teacher), rows))
    for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sinkhorn", "ipot", "swav", "unbalanced", "nearest", "softmax"])
def test_gradients_of_the_codebook_loss_are_central_differences(name):
    assign = getattr(method, name)()
    with jax.enable_x64(True):
        student, codes = features(0, "a", "b", dtype=np.float64), codes_of(1, np.float64)
        teacher = features(2, "a", "b", dtype=np.float64)
        given = dict(teacher=teacher, assign=assign)
        fixed = jax.jit(lambda *z: method.codebook_alignment(*z, **given)[1])(student, codes)

        @jax.jit
        def loss(z, codes):  # the assignment passes no gradient, so it is held
            hold = lambda cost, here: fixed.assignments[place.pop(0)] / BATCH  # noqa: E731
            place = ["a", "b"]
            return method.codebook_alignment(z, codes, teacher=teacher, assign=hold)[0]

        at = student, codes
        direction = jax.tree.map(lambda x: np.random.default_rng(3).normal(size=x.shape), at)
        step = lambda h: jax.tree.map(lambda x, d: x + h * d, at, direction)  # noqa: E731
        slope = (loss(*step(1e-5)) - loss(*step(-1e-5))) / 2e-5
        whole = lambda *z: method.codebook_alignment(*z, **given)[0]  # noqa: E731
        gradient = jax.jit(jax.grad(whole, (0, 1)))(*at)
        along = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)),
                                                  strict=True))  # fmt: skip
    np.testing.assert_allclose(along, slope, rtol=1e-6)


def test_losses_of_bfloat16_features_are_float32_and_vmap_is_a_loop():
    student = {n: x.astype(jnp.bfloat16) for n, x in features(0, "a", "b").items()}
    loss, aux = aligned(student, codes_of(1))
    assert loss.dtype == aux.per_sample.dtype == jnp.float32
    many = features(0, "a", "b", shape=(3, BATCH, DIM))
    found, _ = jax.vmap(lambda z: aligned(z, codes_of(1)))(many)
    for i in range(3):
        one, _ = aligned({n: x[i] for n, x in many.items()}, codes_of(1))
        np.testing.assert_allclose(found[i], one, rtol=1e-6)


def test_the_module_and_the_functions_are_the_loss_with_codes_that_learn():
    both = features(0, "a", "b")
    module = method.CodebookAlignment(codes=CODES, dim=DIM, rngs=nnx.Rngs(0), assign=ASSIGN)
    init, apply = method.codebook_functions(codes=CODES, dim=DIM, assign=ASSIGN)
    parameters = init(jax.random.key(1))
    assert {leaf.shape for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))} == {(CODES, DIM)}
    parameters = {"codes": module.codes[...]}
    expected = aligned(both, parameters["codes"])[0]
    assert module(both)[0] == apply(parameters, both)[0] == expected
    sgd = optax.sgd(0.1)
    gradient = jax.grad(lambda p: apply(p, both)[0])(parameters)
    updates, _ = sgd.update(gradient, sgd.init(parameters))
    assert apply(optax.apply_updates(parameters, updates), both)[0] < expected


# -- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(student=("a", "b")), "student must map names .* tuple"),
        (dict(student={"a": np.ones((4, 3))}), r"the modalities \['a'\]: two or more"),
        (dict(student={"a": np.ones((4, 3)), "b": np.ones((5, 3))}), r"\(4, 3\) .* \(5, 3\)"),
        (dict(student={"a": np.ones((4, 3)), "b": np.ones((4, 2))}), r"\(4, 3\) .* \(4, 2\)"),
        (dict(student={"a": np.ones((4, 0, 3)), "b": np.ones((4, 2, 3))}), r"\(4, 0, 3\)"),
        (dict(codes=np.ones((5, 7))), r"codes are \(5, 7\) but student\['a'\] is \(4, 3\)"),
        (dict(teacher={"a": np.ones((4, 3))}), "teacher is .* but student"),
        (dict(valid={"c": np.ones(4, bool)}), r"valid\['c'\] is of no modality"),
        (dict(valid={"a": np.ones(5, bool)}), r"valid\['a'\] is \(5,\), not \(4,\)"),
        (
            dict(student={"a": [[1.0]], "b": np.ones((1, 1))}),
            r"student\['a'\] must be an array.*list",
        ),
        (dict(codes=[[1.0, 2.0, 3.0]]), "codes must be an array, but is a list"),
        (dict(valid={"a": [True] * 4}), r"valid\['a'\] must be an array, but is a list"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(temperature=None), "temperature=None must be a number above 0"),
        (dict(order=method.Order()), "order is for sequences"),
    ],
)
def test_what_does_not_fit_is_one_sentence_at_trace_time(change, said):
    given = dict(student={"a": np.ones((4, 3)), "b": np.ones((4, 3))}, codes=np.ones((5, 3)))
    given |= change
    student, codes = given.pop("student"), given.pop("codes")
    with pytest.raises(ValueError, match=said):
        method.codebook_alignment(student, codes, **given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(teacher=None), "intra_weight=1.0 needs a teacher"),
        (dict(ids=np.arange(3)), r"ids are \(3,\), not \(4,\)"),
        (dict(queue=method.empty_queue(("a", "c"), size=8, dim=3)), "a queue of .* does not go"),
        (dict(same="maybe"), 'same="maybe"'),
    ],
)
def test_instance_alignment_refuses_what_does_not_fit(change, said):
    both = {"a": np.ones((4, 3)), "b": np.ones((4, 3))}
    given = {"teacher": both} | change
    with pytest.raises(ValueError, match=said):
        method.instance_alignment(both, given.pop("teacher"), **given)


@pytest.mark.parametrize(
    ("batch", "said"),
    [({"a": jnp.ones((3, 2))}, "do not go into"), ({n: jnp.ones((9, 2)) for n in "ab"}, "9 feat")],
)
def test_a_queue_refuses_other_names_and_more_than_it_holds(batch, said):
    with pytest.raises(ValueError, match=said):
        method.enqueue(method.empty_queue("ab", size=8, dim=2), batch)


def test_importing_the_method_imports_no_trainer():
    names = "orbax grain transformers tensorflow codebook_jax.train codebook_jax.tasks".split()
    code = "import sys; from codebook_jax import method; "
    code += f"print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
