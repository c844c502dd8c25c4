"""The teacher's average, the queues and the window of codeword usage against Python's own
containers and NumPy.
"""

from collections import Counter, deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebook_jax.method.codebook import (
    add_winners,
    codebook_scalars,
    empty_usage,
    perplexity_and_unused,
)
from codebook_jax.method.queue import empty_queue, enqueue, newest
from codebook_jax.method.teacher import momentum_at, momentum_average

_ENQUEUE, _RECORD = jax.jit(enqueue), jax.jit(add_winners)
_NEWEST = jax.jit(newest, static_argnums=1)
NAMES = ("image", "text")
_STATISTICS = jax.jit(perplexity_and_unused, static_argnums=1)


def test_five_averages_are_the_closed_form_of_all_five_students():
    rng = np.random.default_rng(0)
    m, steps = 0.9, 5
    start = rng.normal(size=(3, 7)).astype(np.float32)
    students = rng.normal(size=(steps, 3, 7)).astype(np.float32)
    teacher = {"towers": {"kernel": jnp.asarray(start)}}
    for student in students:
        student = {"towers": {"kernel": jnp.asarray(student)}}
        teacher = momentum_average(teacher, student, jnp.float32(m))
    weights = np.array([(1 - m) * m ** (steps - 1 - s) for s in range(steps)])
    expected = m**steps * start.astype(np.float64) + np.einsum("s,sij->ij", weights, students)
    np.testing.assert_allclose(teacher["towers"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert teacher["towers"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("step", [0, 1, 5, 89, 890, 10_000_000])
def test_momentum_ramps_as_one_plus_s_over_ten_plus_s_up_to_its_value(step):
    ramped = momentum_at(jnp.int32(step), momentum=0.99, ramp=True)
    np.testing.assert_allclose(ramped, min(0.99, (1 + step) / (10 + step)), rtol=1e-6)
    constant = momentum_at(jnp.int32(step), momentum=0.99, ramp=False)
    np.testing.assert_allclose(constant, 0.99, rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 11])
def test_the_queue_holds_what_a_deque_holds_for_batches_that_do_not_divide_it(batch):
    size, dim = 11, 2
    rng = np.random.default_rng(batch)
    queue = empty_queue(NAMES, size=size, dim=dim)
    last = deque(maxlen=size)
    assert not np.asarray(queue.valid).any()
    for _ in range(9):
        image, text = rng.normal(size=(2, batch, dim)).astype(np.float32)
        queue = _ENQUEUE(queue, {"image": jnp.asarray(image), "text": jnp.asarray(text)})
        last.extend(zip(map(tuple, image), map(tuple, text), strict=True))
        valid = np.asarray(queue.valid)
        assert valid.sum() == len(last) == int(queue.filled)
        held = zip(
            map(tuple, np.asarray(queue.features["image"])[valid]),
            map(tuple, np.asarray(queue.features["text"])[valid]),
            strict=True,
        )
        assert set(held) == set(last)  # an image stays next to its text


@pytest.mark.parametrize("batch", [3, 4])
def test_the_newest_of_the_queue_are_the_last_of_the_deque_newest_first(batch):
    size, count = 11, 6
    rng = np.random.default_rng(batch)
    queue, last = empty_queue(NAMES, size=size, dim=1), deque(maxlen=size)
    for _ in range(7):
        values = rng.normal(size=batch).astype(np.float32)
        column = jnp.asarray(values)[:, None]
        queue = _ENQUEUE(queue, {"image": column, "text": -column})
        last.extend(values)
        found, here = _NEWEST(queue, count)
        expected = list(last)[::-1][:count]
        assert int(here.sum()) == len(expected) and np.asarray(here)[: len(expected)].all()
        np.testing.assert_array_equal(found["image"][: len(expected), 0], expected)
        np.testing.assert_array_equal(found["text"][: len(expected), 0], np.negative(expected))


def test_queues_stay_float32_whatever_the_features_are():
    features = jnp.full((2, 3), 0.1, jnp.bfloat16)
    queue = empty_queue(NAMES, size=4, dim=3)
    queue = _ENQUEUE(queue, {"image": features, "text": features})
    assert {ring.dtype for ring in queue.features.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("window", "batch"), [(10, 3), (12, 4), (7, 7), (5, 8)])
def test_usage_is_counted_over_the_newest_samples_of_the_window(window, batch):
    codes = 9
    rng = np.random.default_rng(window)
    usage = empty_usage(window)
    last = [deque(maxlen=window), deque(maxlen=window)]
    for _ in range(6):
        winners = rng.choice(codes, p=np.arange(codes) / 36, size=(2, batch))
        usage = _RECORD(usage, jnp.asarray(winners))
        perplexity, unused = _STATISTICS(usage.winners, codes)
        for modality in range(2):
            last[modality].extend(winners[modality][:window])
            counts = Counter(last[modality])
            share = np.array(list(counts.values())) / counts.total()
            entropy = -np.sum(share * np.log(share))
            np.testing.assert_allclose(perplexity[modality], np.exp(entropy), rtol=1e-5)
            np.testing.assert_allclose(unused[modality], 1 - len(counts) / codes, atol=1e-6)


def test_perplexity_is_the_number_of_codewords_used_evenly():
    winners = jnp.tile(jnp.array([[0, 2, 4, 6], [1, 1, 1, 1]]), 5)
    perplexity, unused = _STATISTICS(_RECORD(empty_usage(20), winners).winners, 8)
    np.testing.assert_allclose(perplexity, [4, 1], rtol=1e-6)
    np.testing.assert_allclose(unused, [1 / 2, 7 / 8], rtol=1e-6)


def test_the_share_of_uniform_use_is_that_of_the_samples_in_the_window():
    plan = jnp.full((2, 3, 40), 1 / 120, jnp.float32)
    scalars = jax.jit(codebook_scalars, static_argnums=(2, 3))
    usage = empty_usage(10)
    for filled in (3, 6, 9, 10, 10):
        usage = _RECORD(usage, jnp.zeros((2, 3), jnp.int32))
        uniform = scalars(usage, plan, 3, NAMES)["codebook/unused_share_uniform"]
        np.testing.assert_allclose(uniform, (1 - 1 / 40) ** filled, rtol=1e-5)


def test_a_window_without_samples_uses_no_codeword_and_has_perplexity_one():
    perplexity, unused = _STATISTICS(empty_usage(20).winners, 8)
    np.testing.assert_array_equal(perplexity, 1)
    np.testing.assert_array_equal(unused, 1)
