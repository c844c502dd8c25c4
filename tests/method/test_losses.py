"""The four losses: closed forms, what their gradients reach, and what they refuse
(test_objective.py has the equations).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from codebook_jax import method
from codebook_jax.method import alignment
from codebook_jax.method.codebook import code_losses
from codebook_jax.method.masking import masked_word_loss
from codebook_jax.method.matching import matching_loss
from codebook_jax.method.queue import Queue
from codebook_jax.tasks.draws import Pair

BATCH, QUEUE, FILLED, DIM, CODES = 7, 11, 5, 13, 17
VALID = np.arange(QUEUE) < FILLED
IMAGE_ID = np.array([3, 1, 3, 2, 3, 1, 0], np.int32)  # three texts of one image, two of another


@functools.partial(jax.jit, static_argnames=("intra_weight", "same"))
def _aligned(student, teacher, queue, ids, *, intra_weight, **options):
    found = alignment.cross_entropies(student, teacher, queue, ids, **options)
    return alignment.alignment_loss(found, intra_weight=intra_weight)


_instance = jax.jit(method.instance_alignment, static_argnames="same")


def unit_rows(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def pair_of(rng, *shape):
    return Pair(unit_rows(rng, *shape), unit_rows(rng, *shape))


def alignment_arguments(seed):
    rng = np.random.default_rng(seed)
    features = [pair_of(rng, rows, DIM) for rows in (BATCH, BATCH, QUEUE)]
    return *features, VALID, IMAGE_ID


def aligned(
    student,
    teacher,
    queue,
    valid,
    image_id,
    *,
    temperature=0.07,
    alpha=0.4,
    intra_weight=1.0,
    same_image="ignore",
):
    return _aligned(
        student._asdict(),
        teacher._asdict(),
        Queue(queue._asdict(), np.int32(0), np.int32(valid.sum())),
        image_id,
        temperature=jnp.asarray(temperature),
        alpha=jnp.asarray(alpha),
        intra_weight=intra_weight,
        same=same_image,
    )


@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
def test_uninformative_features_score_the_logarithm_of_the_number_of_candidates(temperature):
    same = np.tile(unit_rows(np.random.default_rng(3), 1, DIM), (BATCH, 1))
    features = Pair(same, same)
    queue = Pair(np.zeros((QUEUE, DIM), np.float32), np.zeros((QUEUE, DIM), np.float32))
    nothing = np.zeros(QUEUE, bool)
    different = np.arange(BATCH, dtype=np.int32)
    loss = aligned(features, features, queue, nothing, different, temperature=temperature)
    np.testing.assert_allclose(loss, np.log(BATCH), rtol=1e-5)
    full = Pair(*(np.tile(x[:1], (QUEUE, 1)) for x in features))
    loss = aligned(features, features, full, VALID, different, temperature=temperature)
    np.testing.assert_allclose(loss, np.log(BATCH + FILLED), rtol=1e-5)
    alone = aligned(features, features, queue, nothing, np.zeros(BATCH, np.int32))
    np.testing.assert_allclose(alone, 0.0, atol=1e-6)  # all of one image: nobody to be told from


def test_a_perfect_student_of_a_cold_softmax_has_no_alignment_loss():
    features = Pair(np.eye(BATCH, DIM, dtype=np.float32), np.eye(BATCH, DIM, dtype=np.float32))
    queue = Pair(*(np.roll(np.eye(QUEUE, DIM, dtype=np.float32), BATCH, axis=1) for _ in range(2)))
    loss = aligned(
        features, features, queue, np.zeros(QUEUE, bool), np.arange(BATCH), temperature=0.01
    )
    assert 0 <= float(loss) < 1e-5


@pytest.mark.parametrize("same_image", ["ignore", "negative"])
def test_places_of_the_queue_that_are_not_valid_change_neither_loss_nor_gradient(same_image):
    student, teacher, queue, valid, image_id = alignment_arguments(4)

    def value_and_gradient(queue):
        return jax.value_and_grad(
            lambda s: aligned(s, teacher, queue, valid, image_id, same_image=same_image)
        )(student)

    def filled_with(value):
        return Pair(*(np.where(valid[:, None], x, np.float32(value)) for x in queue))

    loss, gradient = value_and_gradient(filled_with(0.0))
    for garbage in (1.0, -1e20, 1e20):
        other, other_gradient = value_and_gradient(filled_with(garbage))
        np.testing.assert_array_equal(other, loss)
        jax.tree.map(np.testing.assert_array_equal, other_gradient, gradient)
    np.testing.assert_array_equal(value_and_gradient(filled_with(np.nan))[0], loss)


def test_alignment_teaches_the_student_and_the_temperature_alone():
    student, teacher, queue, valid, image_id = alignment_arguments(5)
    gradients = jax.grad(
        lambda s, t, q, tau: aligned(s, t, q, valid, image_id, temperature=tau),
        argnums=(0, 1, 2, 3),
    )(student, teacher, queue, 0.07)
    to_student, to_teacher, to_queue, to_temperature = gradients
    assert all(np.abs(g).max() > 1e-3 for g in to_student) and abs(float(to_temperature)) > 1e-3
    assert all((np.asarray(g) == 0).all() for g in (*to_teacher, *to_queue))


def test_an_unknown_treatment_of_the_same_image_is_refused():
    with pytest.raises(ValueError, match='same="maybe"'):
        aligned(*alignment_arguments(0), same_image="maybe")


def test_positives_of_one_image_share_the_target_in_batch_and_queue():
    """Beside NumPy in float64: (1 - alpha) matches / their number + alpha times the softmax of the
    teacher over all candidates (ALBEF's retrieval).
    """
    student, teacher, queue, valid, image_id = alignment_arguments(8)
    queue_ids = np.resize(np.array([*image_id, -1]), QUEUE).astype(np.int32)
    tau, alpha = 0.1, 0.4
    found = _aligned(
        student._asdict(),
        teacher._asdict(),
        Queue(queue._asdict(), np.int32(0), np.int32(valid.sum()), queue_ids),
        image_id,
        temperature=jnp.asarray(tau),
        alpha=jnp.asarray(alpha),
        intra_weight=0.0,
        same="positive",
    )
    ids = np.concatenate([image_id, queue_ids[valid]])
    matches = (image_id[:, None] == ids).astype(np.float64)
    assert (matches.sum(axis=1) > 1).any() and (matches[:, BATCH:].sum() > 0)

    def softmax(x):
        x = np.exp(x - x.max(axis=1, keepdims=True))
        return x / x.sum(axis=1, keepdims=True)

    losses = []
    for query, key in (("image", "text"), ("text", "image")):
        candidates = np.concatenate([getattr(teacher, key), getattr(queue, key)[valid]])
        candidates = candidates.astype(np.float64)
        soft = softmax(getattr(teacher, query) @ candidates.T / tau)
        targets = (1 - alpha) * matches / matches.sum(axis=1, keepdims=True) + alpha * soft
        log_p = np.log(softmax(getattr(student, query) @ candidates.T / tau))
        losses.append(-(targets * log_p).sum(axis=1).mean())
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def codebook_arguments(seed):
    rng = np.random.default_rng(seed)
    plans = Pair(*rng.dirichlet(np.full(CODES, 0.3), size=(2, BATCH)).astype(np.float32))
    return pair_of(rng, BATCH, DIM), pair_of(rng, BATCH, DIM), unit_rows(rng, CODES, DIM), plans


def test_students_that_point_nowhere_predict_codes_at_log_of_their_number():
    _, teacher, codes, plans = codebook_arguments(0)
    nowhere = Pair(np.zeros((BATCH, DIM), np.float32), np.zeros((BATCH, DIM), np.float32))
    given = nowhere._asdict(), teacher._asdict(), codes, plans._asdict()
    for predicted in code_losses(*given, temperature=0.1).predicted.values():
        np.testing.assert_allclose(predicted, np.log(CODES), rtol=1e-5)


def test_codebook_losses_teach_neither_teacher_nor_plan_and_the_student_by_predictions_alone():
    student, teacher, codes, plans = codebook_arguments(1)
    arguments = student._asdict(), teacher._asdict(), codes, plans._asdict()
    parts = {
        "transport": lambda found: sum(found.transport.values()),
        "text_to_code": lambda found: found.predicted["text", "image"],
        "image_to_code": lambda found: found.predicted["image", "text"],
    }

    def gradients(part):
        return jax.grad(
            lambda *a: part(code_losses(*a, temperature=0.1)).sum(), argnums=(0, 1, 2, 3)
        )(*arguments)

    reached = {
        name: [bool(np.any(np.asarray(g) != 0)) for g in jax.tree.leaves(gradients(part))]
        for name, part in parts.items()
    }
    # student image, student text, teacher image, teacher text, codes, plan image, plan text
    assert reached == {
        "transport": [False, False, False, False, True, False, False],
        "text_to_code": [False, True, False, False, True, False, False],
        "image_to_code": [True, False, False, False, True, False, False],
    }


def test_matching_class_one_means_match():
    logits = np.array([[-20.0, 20.0]], np.float32)
    one = np.ones(1, np.float32)
    assert float(matching_loss(logits, np.array([True]), one)) < 1e-6
    assert float(matching_loss(logits, np.array([False]), one)) > 39


def test_slots_without_a_hidden_word_change_nothing():
    rng = np.random.default_rng(7)
    logits, soft = rng.normal(size=(2, 5, 3, 19)).astype(np.float32) * 3
    words = rng.integers(0, 19, (5, 3))
    used = rng.random((5, 3)) < 0.6
    weights = (used / used.sum()).astype(np.float32)
    loss = masked_word_loss(logits, soft, words, weights, alpha=jnp.float32(0.4))
    garbage = np.where(used[..., None], logits, np.float32(1e6))
    np.testing.assert_array_equal(
        masked_word_loss(garbage, soft, words, weights, alpha=jnp.float32(0.4)), loss
    )


def test_masked_words_send_no_gradient_to_the_teacher():
    rng = np.random.default_rng(8)
    logits, soft = rng.normal(size=(2, 4, 9)).astype(np.float32)
    words, weights = np.arange(4), np.full(4, 0.25, np.float32)
    to_student, to_teacher = jax.grad(
        lambda a, b: masked_word_loss(a, b, words, weights, alpha=jnp.float32(0.4)), argnums=(0, 1)
    )(logits, soft)
    assert np.abs(to_student).max() > 1e-3 and (np.asarray(to_teacher) == 0).all()
    # The gradient of a cross-entropy: what is predicted minus what is wanted.
    wanted = 0.6 * np.eye(9)[words] + 0.4 * softmax(soft.astype(np.float64), axis=1)
    expected = 0.25 * (softmax(logits.astype(np.float64), axis=1) - wanted)
    np.testing.assert_allclose(to_student, expected, atol=1e-6)


def test_an_earlier_copy_of_a_sample_is_no_candidate_in_a_queue_that_remembers_ids():
    z = {name: np.eye(BATCH, dtype=np.float32) for name in ("image", "text")}
    ids = np.arange(BATCH, dtype=np.int32)

    def loss(queue, **options):
        return _instance(z, z, queue=queue, ids=ids, temperature=0.01, **options)[0]

    plain, whose = (
        method.empty_queue(tuple(z), size=2 * BATCH, dim=BATCH, with_ids=with_ids)
        for with_ids in (False, True)
    )
    two_right = np.log(2)  # the sample and its copy are as likely
    np.testing.assert_allclose(loss(method.enqueue(plain, z)), two_right, rtol=1e-5)
    np.testing.assert_allclose(loss(method.enqueue(whose, z, ids)), 0, atol=1e-6)
    negative = loss(method.enqueue(whose, z, ids), same="negative")
    np.testing.assert_allclose(negative, two_right, rtol=1e-5)
    np.testing.assert_allclose(loss(method.enqueue(whose, z, ids + 100)), two_right, rtol=1e-5)
    loaded = dataclasses.replace(method.enqueue(plain, z), ids=whose.ids)  # of no sample
    np.testing.assert_allclose(loss(loaded), two_right, rtol=1e-5)
    for call in (lambda: method.enqueue(whose, z), lambda: _instance(z, z, queue=whose)):
        with pytest.raises(ValueError, match="the queue remembers the ids"):
            call()
