"""The step on stories: losses beside NumPy's; eight devices or two passes give the same."""

import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from small_run import ROOT
from small_task import CONFIG, VOCABULARY, assert_close, run

from codebook_jax.data.batch import StoryBatch
from codebook_jax.parallel import sharding
from codebook_jax.tasks.sequences import Sequences, Steps, order_of, step_alignment

STORIES, FRAMES, SENTENCES = 8, 4, 3
SIDE, TOKENS = CONFIG["model.image.size_px"], CONFIG["model.text.max_tokens"]
SMALL = {
    name: CONFIG[name]
    for name in CONFIG
    if name.startswith(("model.", "optimizer.", "train.")) or name == "codebook.size"
} | {
    "sequences.max_frames": FRAMES,
    "sequences.max_sentences": SENTENCES,
    "data.global_batch": STORIES,
    "sequences.iterations": 20,
}
CONFIGS = runpy.run_path(str(ROOT / "configs" / "sequences.py"))


def task_on(*sizes, **changes):
    config = CONFIGS["get_config"]("tiny")
    config.update_from_flattened_dict(SMALL | changes)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return Sequences(config, VOCABULARY, mesh)


def stories_of(seed, **changes):
    rng = np.random.default_rng(seed)
    frame_count = rng.integers(2, FRAMES + 1, STORIES).astype(np.int32)
    sentence_count = rng.integers(2, SENTENCES + 1, STORIES).astype(np.int32)
    frames = rng.integers(0, 256, (STORIES, FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
    tokens = rng.integers(5, 40, (STORIES, SENTENCES, TOKENS)).astype(np.int32)
    lengths = rng.integers(3, TOKENS + 1, (STORIES, SENTENCES)).astype(np.int32)
    example = np.arange(STORIES, dtype=np.int32)
    batch = StoryBatch(
        frames,
        frames,
        frame_count,
        tokens,
        lengths,
        sentence_count,
        example,
        np.zeros_like(example),
    )
    return batch._replace(**changes)


BATCHES = [stories_of(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def one():
    task = task_on(1, 1, 1)
    first = jax.device_get(task.init_state(0))
    states, scalars = run(task, first, BATCHES)
    return SimpleNamespace(task=task, first=first, states=states, scalars=scalars)


def features_of(task, student, batch):
    """Of all steps by the towers alone, in float64."""
    images, _ = task.model.encode_images(student["towers"], batch.frames.reshape(-1, SIDE, SIDE, 3))
    texts, _ = task.model.encode_texts(
        student["towers"], batch.tokens.reshape(-1, TOKENS), batch.text_length.ravel()
    )
    return (np.asarray(x, np.float64).reshape(STORIES, -1, x.shape[-1]) for x in (images, texts))


def plan_of(cost, order):
    """Su & Hua's alignment of one pair of sequences, by turns in float64."""
    n, m = cost.shape
    i, j = np.arange(1, n + 1)[:, None] / n, np.arange(1, m + 1)[None] / m
    squared = (i - j) ** 2
    prior = order.spread * squared / (2 * order.width**2 * (1 / n**2 + 1 / m**2))
    kernel = np.exp(-(cost - order.locality / (squared + 1) + prior) / order.spread)
    b = np.ones(m)
    for _ in range(order.iterations):
        b = (1 / m) / ((1 / n) / (kernel @ b) @ kernel)
    plan = kernel * b
    return plan / plan.sum(axis=1, keepdims=True) / n


def test_the_losses_are_those_of_numpy(one):
    """Steps find those they are aligned with, and codes are carried over the alignment."""
    task, batch, student = one.task, BATCHES[0], one.first.student
    order, config = order_of(task.config), task.config
    frames, sentences = features_of(task, student, batch)
    n, m = batch.frame_count, batch.sentence_count
    plans = {}
    for at in range(STORIES):
        cosines = frames[at, : n[at]] @ sentences[at, : m[at]].T
        plans[at] = plan_of(1 - cosines, order)
    everything = {"v": (frames, n), "t": (sentences, m)}
    directions = {}
    for a, (queries, own_steps) in everything.items():
        for b, (candidates, steps) in everything.items():
            rows = np.concatenate([candidates[at, : steps[at]] for at in range(STORIES)])
            starts = np.cumsum([0, *steps])
            of_stories = []
            for at in range(STORIES):
                logits = queries[at, : own_steps[at]] @ rows.T / config.alignment.temperature
                p = softmax(logits, axis=1)[:, starts[at] : starts[at + 1]]
                plan = {"vt": plans[at], "tv": plans[at].T}.get(a + b, np.eye(own_steps[at]))
                weights = plan / plan.sum(axis=1, keepdims=True)
                of_stories.append(-np.log((weights * p).sum(axis=1)).mean())
            directions[a + b] = np.mean(of_stories)
    intra = config.alignment.intra_weight
    expected = directions["vt"] + directions["tv"] + intra * (directions["vv"] + directions["tt"])
    expected /= 2 + 2 * intra
    np.testing.assert_allclose(one.scalars[0]["loss/alignment"], expected, rtol=2e-5)

    codes = np.asarray(student["codebook"]["codes"], np.float64)
    log_p, costs, q = {}, {}, {}
    here = {"v": np.arange(FRAMES) < n[:, None], "t": np.arange(SENTENCES) < m[:, None]}
    for side, z in (("v", frames), ("t", sentences)):
        costs[side] = 1 - z @ codes.T
        log_p[side] = log_softmax((1 - costs[side]) / config.codebook.temperature, axis=-1)
        rows = costs[side][here[side]]  # the teacher is a copy of the student at the start
        potential = np.zeros(len(codes))
        for _ in range(config.codebook.iterations):
            kernel = np.exp((potential - rows) / config.codebook.epsilon)
            share = kernel / kernel.sum(axis=1, keepdims=True) / len(rows)
            potential += config.codebook.epsilon * np.log(1 / len(codes) / share.sum(axis=0))
        kernel = np.exp((potential - rows) / config.codebook.epsilon)
        q[side] = np.zeros(costs[side].shape)
        q[side][here[side]] = kernel / kernel.sum(axis=1, keepdims=True)
    transport, predicted = np.zeros(2), np.zeros(2)
    for at in range(STORIES):
        v, t = slice(n[at]), slice(m[at])
        plan = plans[at]
        to_text = plan.T @ q["v"][at, v] / plan.sum(axis=0)[:, None]
        to_frames = plan @ q["t"][at, t] / plan.sum(axis=1)[:, None]
        transport += [
            (q[side][at, steps] * costs[side][at, steps]).sum(axis=1).mean()
            for side, steps in (("v", v), ("t", t))
        ]
        predicted -= [
            (to_text * log_p["t"][at, t]).sum(axis=1).mean(),
            (to_frames * log_p["v"][at, v]).sum(axis=1).mean(),
        ]
    expected = (transport.sum() + predicted.sum()) / STORIES
    np.testing.assert_allclose(one.scalars[0]["loss/codebook"], expected, rtol=2e-4)


def test_padding_means_nothing(one):
    """Frames and sentences that are not there can hold anything."""
    rng = np.random.default_rng(5)
    batch = BATCHES[0]
    padded = (np.arange(FRAMES) >= batch.frame_count[:, None])[..., None, None, None]
    frames = np.where(padded, rng.integers(0, 256, batch.frames.shape), batch.frames)
    frames = frames.astype(np.uint8)
    padded = (np.arange(SENTENCES) >= batch.sentence_count[:, None])[..., None]
    tokens = np.where(padded, 7, batch.tokens).astype(np.int32)
    other = batch._replace(frames=frames, teacher_frames=frames, tokens=tokens)
    _, scalars = run(one.task, one.first, [other])
    for name, value in one.scalars[0].items():
        np.testing.assert_allclose(scalars[0][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "sizes, passes",
    [
        ((4, 2, 1), 1),
        pytest.param((1, 1, 1), 2, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_and_two_passes_give_the_steps_of_one(sizes, passes, one):
    task = task_on(*sizes, **{"optimizer.accumulation": passes})
    states, scalars = run(task, one.first, BATCHES)
    for step, (found, expected) in enumerate(zip(scalars, one.scalars, strict=True)):
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {step}"
            )
    assert_close(states[0].moments, one.states[0].moments, rtol=1e-4)
    assert_close(states[1].student, one.states[1].student, rtol=1e-4)
    assert_close(states[1].teacher, one.states[1].teacher, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_only_the_counts(one):
    broken = jax.tree.map(np.copy, one.first.student)
    broken["towers"]["text"]["words"][:] = np.nan
    before = one.first.replace(student=broken)
    states, scalars = run(one.task, before, BATCHES[:1])
    assert scalars[0]["bad_step"] and states[0].bad_in_row == states[0].step == 1
    assert_close(states[0].moments, before.moments, rtol=0)


def one_step_each(cosines, plan=1.0, story=(4, 4, 5)):
    """`step_alignment` of three stories of one frame and one sentence with these cosines."""
    frames, sentences = (np.array(x, np.float32)[:, None] for x in (np.eye(3), cosines.T))
    sides, here = Steps(frames, sentences), Steps(np.ones((3, 1), bool), np.ones((3, 1), bool))
    plan = np.full((3, 1, 1), plan, np.float32)
    options = dict(temperature=1.0, intra_weight=0.0)
    return step_alignment(sides, sides, plan, here, np.array(story), **options)


def test_another_row_of_the_same_story_is_no_candidate():
    cosines = np.array([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    kept = np.where([[1, 0, 1], [0, 1, 1], [1, 1, 1]], cosines, -np.inf)
    expected = -np.mean([np.diag(log_softmax(kept, axis=axis)) for axis in (0, 1)])
    np.testing.assert_allclose(one_step_each(cosines), expected, rtol=1e-6)


def test_a_step_counts_by_the_share_of_it_that_is_matched():
    cosines = np.random.default_rng(0).normal(size=(3, 3))
    whole, part = one_step_each(cosines), one_step_each(cosines, plan=0.25)
    np.testing.assert_allclose(part, 0.25 * whole, rtol=1e-6)
