"""One pre-training step: the same on every mesh and with every number of passes, and what it may
and may not change.
"""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small_task import (
    BATCH,
    IMAGE_TOKENS,
    assert_close,
    batch_of,
    compiled_on,
    drawing,
    named,
    run,
    saying,
    task_on,
    walk,
)

from codebook_jax.method.codebook import soft_codes
from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from codebook_jax.tasks.draws import Pair, draw_inputs


@pytest.fixture(scope="module")
def one():
    """The task on one device, and its fresh state on the host."""
    task = task_on(1, 1, 1)
    return SimpleNamespace(task=task, first=jax.device_get(task.init_state(0)))


@pytest.fixture(scope="module")
def five(one):
    """Five straight steps on one device: the state before each and after the last, and the
    scalars.
    """
    batches = [batch_of(seed) for seed in range(5)]
    return walk(one.task, one.first, batches)


@pytest.fixture(scope="module")
def five_others(one):
    """Five more, covering what the others leave out: images with several texts, some without a
    negative, other choices.
    """
    task = task_on(
        1,
        1,
        1,
        **{
            "itm.groups": 4,
            "codebook.solver": "ipot",
            "codebook.queue_samples": 24,
            "alignment.intra_weight": 0.5,
            "teacher.momentum_ramp": False,
        },
    )
    ids = np.array([0, 1, 2, 0, 4, 4, 4, 4, 8, 0, 10, 11, 12, 13, 12, 15], np.int32)
    return walk(task, one.first, [batch_of(seed, image_id=ids) for seed in range(5)])


# -- the same everywhere


def test_five_steps_on_eight_devices_are_those_of_one(one, five):
    task, compiled = compiled_on(8, 1, 1)
    states, scalars = run(task, one.first, five.batches, compiled)
    for step, (found, expected) in enumerate(zip(scalars, five.scalars, strict=True)):
        for name in ("loss", "gradient_norm", *(n for n in expected if n.startswith("loss/"))):
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-4, err_msg=f"{name} of step {step}"
            )
    # The first moments after one step are the gradients, times a tenth.
    assert_close(states[0].moments, five.states[1].moments, rtol=1e-4)
    assert_close(states[-1].queue, five.states[-1].queue, rtol=1e-3)


def moved_between_devices(text):
    """Shapes of what a compiled program sends between devices without summing it."""
    kinds = "all-gather|all-to-all|collective-permute|collective-broadcast"
    moving = rf"= (.*?) (?:{kinds})(?:-start)?\((.*?)\)"
    return [
        tuple(int(size) for size in shape.split(",") if size)
        for line in text.splitlines()
        for found in re.findall(moving, line)
        for shape in re.findall(r"\w+\[([\d,]*)\]", found[0])
    ]


def test_collectives_are_found_in_a_program():
    line = "%all-gather.3 = f32[16,10,8]{2,1,0} all-gather(f32[2,10,8]{2,1,0} %p), channel_id=1"
    assert moved_between_devices(line) == [(16, 10, 8)]
    line = "%x = (f32[2,10]{1,0}, f32[16,10]{1,0}) all-gather-start(%p), channel_id=1"
    assert moved_between_devices(line) == [(2, 10), (16, 10)]
    assert moved_between_devices("%y = f32[16,10,8] all-reduce(%p), channel_id=1") == []


def test_image_tokens_stay_on_their_device_when_every_shard_is_its_own_group():
    text = compiled_on(8, 1, 1)[1].as_text()
    moved = moved_between_devices(text)
    assert moved  # the features do
    patches = (IMAGE_TOKENS, IMAGE_TOKENS - 1)
    assert not [s for s in moved if len(s) >= 3 and any(size in patches for size in s)]


# -- the equations


@pytest.fixture(scope="module")
def said(one):
    """The towers' outputs for a batch, and its step's draws, on the host."""
    say, draw = saying(one.task), drawing(one.task)

    def of(state, batch):
        inputs = draw(state.step, batch)
        found = say(state.student, state.teacher, batch, inputs.masked)
        return jax.device_get((found, inputs))

    return of


@pytest.mark.parametrize("steps", ["five", "five_others"])
def test_losses_and_queue_of_five_steps_are_the_references_on_what_the_towers_say(
    steps, said, request
):
    walked = request.getfixturevalue(steps)
    config, draw = walked.task.config, drawing(walked.task)
    ring = reference.Ring(config.queue.size, config.model.dim)
    for step, (batch, scalars) in enumerate(zip(walked.batches, walked.scalars, strict=True)):
        before, after = walked.states[step : step + 2]
        found, inputs = said(before, batch)
        masked, noise = inputs.masked, jax.device_get(draw(step, batch).noise)
        row, slot = np.nonzero(masked.used)
        np.testing.assert_array_equal(
            batch.tokens[row, masked.positions[row, slot]], masked.words[row, slot]
        )
        alpha = reference.alpha_at(step, alpha=0.4, alpha_steps=3)
        np.testing.assert_allclose(scalars["alpha"], alpha, rtol=1e-6)
        learned = dict(
            temperature=float(before.student["temperature"]),
            codebook=before.student["codebook"]["codes"],
            config=config,
        )
        decided = reference.decide(found, ring, batch.image_id, noise, alpha=alpha, **learned)
        expected = reference.objective(found, decided, ring, batch.image_id, masked, **learned)
        assert expected.keys() == {name for name in scalars if name.startswith("loss")}
        for name, loss in expected.items():
            np.testing.assert_allclose(
                scalars[name], loss, rtol=1e-5, err_msg=f"{name} of step {step}"
            )
        ring.enqueue(found.teacher, batch.image_id)
        np.testing.assert_array_equal(after.queue.ids[ring.valid], ring.ids[ring.valid])
        np.testing.assert_array_equal(after.queue.valid, ring.valid)
        np.testing.assert_allclose(list(after.queue.features.values()), ring.rows, atol=1e-6)
        assert scalars["queue/filled"] == ring.valid.sum()


def test_codewords_that_won_are_counted(five, said):
    found, _ = said(five.states[0], five.batches[0])
    after = five.states[1]
    codes = five.states[0].student["codebook"]["codes"]
    for modality, features in enumerate(found.teacher):
        cost = reference.costs(features, reference.unit(codes))
        plan = reference.sinkhorn_plan(cost, epsilon=0.05, iterations=20)
        np.testing.assert_array_equal(after.usage.winners[modality, :BATCH], plan.argmax(1))
        assert (after.usage.winners[modality, BATCH:] == -1).all()


def test_queue_samples_join_the_transport_and_give_no_rows_to_the_loss(five):
    task = task_on(1, 1, 1, **{"codebook.queue_samples": 24})
    state, rng = five.states[1], np.random.default_rng(0)  # 16 in the queue, 24 asked for
    features = rng.normal(size=(2, BATCH, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    plan = jax.jit(task.assign)(Pair(*features), state)
    assert plan.shape == (2, BATCH + 24, 12)
    codes = reference.unit(state.student["codebook"]["codes"])
    for modality, queue in enumerate(state.queue.features.values()):
        rows = np.concatenate([features[modality], queue[:BATCH][::-1]])
        cost = reference.costs(rows, codes)
        expected = reference.sinkhorn_plan(cost, epsilon=0.05, iterations=20)
        np.testing.assert_allclose(plan[modality, : 2 * BATCH], expected, rtol=1e-3, atol=1e-8)
        assert (np.asarray(plan)[modality, 2 * BATCH :] == 0).all()
    after, scalars = jax.eval_shape(task.step, task.abstract_state(), batch_of(0))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(
        lambda x: x.shape, task.abstract_state()
    )
    soft = soft_codes(plan, BATCH)
    assert soft.shape == (2, BATCH, 12) and "codebook/perplexity" in scalars
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)


# -- what a step touches


@pytest.mark.parametrize("steps", ["five", "five_others"])
def test_the_teacher_is_an_average_of_the_students_and_nothing_else_moves_it(steps, request):
    walked = request.getfixturevalue(steps)
    of = walked.task.config.teacher
    teacher = walked.states[0].teacher
    for step, after in enumerate(walked.states[1:]):
        m = reference.momentum_at(step, momentum=of.momentum, ramp=of.momentum_ramp)
        np.testing.assert_allclose(walked.scalars[step]["teacher/momentum"], m, rtol=1e-6)
        teacher = reference.averaged(teacher, after.student["towers"], m)
        new, expected = named(after.teacher), named(teacher)
        assert new.keys() == expected.keys()
        old = named(walked.states[step].teacher)
        assert sum((new[name] != old[name]).any() for name in new) > 30
        for name, array in expected.items():
            np.testing.assert_allclose(new[name], array, rtol=1e-5, atol=1e-7, err_msg=name)


def test_teacher_and_student_never_share_a_buffer(one):
    def buffers(tree):
        return {
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
        }

    state = one.task.init_state(0)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.student["towers"])
    assert not buffers(state.teacher) & buffers(state.student)
    state, _ = one.task.step(state, sharding.put_batch(batch_of(0), one.task.mesh))
    assert not buffers(state.teacher) & buffers(state.student)


@pytest.mark.parametrize("poisoned", ["temperature", "image", "teacher"])
def test_a_step_that_is_not_finite_moves_nothing_but_its_counts(poisoned, one, five):
    before = five.states[2]
    student, teacher = dict(before.student), before.teacher
    nan = lambda tree: jax.tree.map(lambda x: np.full_like(x, np.nan), tree)  # noqa: E731
    if poisoned == "temperature":
        student["temperature"] = np.float32(np.nan)
    elif poisoned == "image":
        towers = student["towers"]
        student["towers"] = towers | {
            "image": towers["image"] | {"cls": nan(towers["image"]["cls"])}
        }
    else:
        teacher = teacher | {"text_projection": nan(teacher["text_projection"])}
    before = before.replace(
        student=student, teacher=teacher, bad_in_row=np.int32(2), bad_total=np.int32(1)
    )
    (after,), (scalars,) = run(one.task, before, [five.batches[2]])
    assert scalars["bad_step"] and not np.isfinite(scalars["loss"])
    counted = {"step": 3, "bad_in_row": 3, "bad_total": 2}
    assert {name: int(getattr(after, name)) for name in counted} == counted
    same = before.replace(**{name: getattr(after, name) for name in counted})
    for name, array in named(same).items():
        np.testing.assert_array_equal(named(after)[name], array, err_msg=name)


def test_a_finite_step_ends_a_row_of_bad_ones(one, five):
    before = five.states[2].replace(bad_in_row=np.int32(2), bad_total=np.int32(2))
    (after,), (scalars,) = run(one.task, before, [five.batches[2]])
    assert (int(after.bad_in_row), int(after.bad_total), int(after.step)) == (0, 2, 3)
    assert not scalars["bad_step"]
    assert (after.student["codebook"]["codes"] != before.student["codebook"]["codes"]).any()


def test_rows_whose_group_is_of_one_image_have_no_negative_and_are_counted(one, five, said):
    ids = np.arange(BATCH, dtype=np.int32)
    ids[[1, 5, 9]] = ids[[0, 4, 8]]  # three of the eight groups of two
    batch = batch_of(0, image_id=ids)
    (_,), (scalars,) = run(one.task, one.first, [batch])
    assert scalars["matching/without_negative"] == 6
    assert five.scalars[0]["matching/without_negative"] == 0
    found, _ = said(one.first, batch)
    own, other = np.arange(BATCH), np.arange(BATCH) ^ 1  # of groups of two
    logits = np.stack([found.match[own, own], found.match[own, other], found.match[other, own]], 1)
    expected = reference.matching(logits, ids != ids[other])
    np.testing.assert_allclose(scalars["loss/matching"], expected, rtol=1e-5)


def test_a_batch_of_one_image_still_makes_a_step(one):
    batch = batch_of(0, image_id=np.zeros(BATCH, np.int32))
    (after,), (scalars,) = run(one.task, one.first, [batch])
    assert scalars["matching/without_negative"] == BATCH and not scalars["bad_step"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("loss", ["alignment", "codebook", "matching", "masked_lm"])
def test_a_weight_of_zero_skips_its_loss_and_its_scalars(loss, five):
    task = task_on(1, 1, 1, **{f"losses.{loss}": 0.0})
    after, scalars = jax.eval_shape(task.step, task.abstract_state(), batch_of(0))
    gone = {name for name in five.scalars[0] if name not in scalars}
    prefixes = {
        "alignment": ("loss/alignment",),
        "codebook": ("loss/codebook", "codebook/", "transport/"),
        "matching": ("loss/matching", "matching/"),
        "masked_lm": ("loss/masked_lm", "masked_lm/"),
    }[loss]
    assert gone == {name for name in five.scalars[0] if name.startswith(prefixes)} != set()
    assert set(scalars) <= set(five.scalars[0])
    assert jax.tree.structure(after) == jax.tree.structure(task.abstract_state())


def test_the_codebook_waits_for_its_frozen_steps_and_the_rest_does_not(five):
    task = task_on(1, 1, 1, **{"codebook.freeze_steps": 2})
    learn = jax.jit(task.learn)
    state = jax.device_put(five.states[0], task.shardings)
    gradients = jax.tree.map(jnp.ones_like, state.student)
    codes = []
    for step in range(3):
        learned = learn(state.replace(step=jnp.int32(step)), gradients)
        codes.append(
            np.abs(learned.student["codebook"]["codes"] - state.student["codebook"]["codes"]).max()
        )
        kernel = ("towers", "image_projection", "kernel")
        before, after = (
            functools.reduce(lambda t, n: t[n], kernel, s.student) for s in (state, learned)
        )
        assert (before != after).any()
        state = learned
    assert codes[0] == codes[1] == 0 and codes[2] > 0


def test_the_temperature_stays_in_its_range(five):
    task = task_on(1, 1, 1, **{"optimizer.learning_rate_ends": 1.0, "optimizer.learning_rate": 1.0})
    state = five.states[0]
    for sign, bound in ((1.0, 0.001), (-1.0, 0.5)):
        gradients = jax.tree.map(lambda x, s=sign: np.full_like(x, s), state.student)
        learned = jax.jit(task.learn)(state, gradients)
        np.testing.assert_allclose(learned.student["temperature"], bound, rtol=1e-6)


# -- views


def views(batch, **changes):
    task = task_on(1, 1, 1, **changes)
    inputs = jax.jit(lambda b, key: draw_inputs(b, key, task.config, task.vocabulary))(
        batch, jax.random.key(0)
    )
    return np.asarray(inputs.image), np.asarray(inputs.teacher_image)


AUGMENTED = {"data.flip": True, "data.randaugment_layers": 2}


def test_student_and_teacher_see_their_own_augmented_views():
    flip = np.arange(BATCH) % 2 == 0
    batch = batch_of(0, flip=flip)
    image, teacher_image = views(batch._replace(teacher_image=batch.image), **AUGMENTED)
    assert image.dtype == teacher_image.dtype == np.uint8 and image.shape == batch.image.shape
    differ = (image != teacher_image).reshape(BATCH, -1).any(axis=1)
    assert differ.sum() > BATCH // 2  # two of ten operations each, so a few may be equal


def test_one_view_for_both_is_the_same_view_and_nothing_is_changed_without_augmentation():
    batch = batch_of(0)
    image, teacher_image = views(batch, **AUGMENTED, **{"data.teacher_view": "same"})
    np.testing.assert_array_equal(image, teacher_image)
    assert (image != batch.image).any()
    image, teacher_image = views(batch)
    np.testing.assert_array_equal(image, batch.image)
    np.testing.assert_array_equal(teacher_image, batch.teacher_image)


def test_a_flip_mirrors_both_views_of_the_samples_that_ask_for_it():
    flip = np.arange(BATCH) % 3 == 0
    batch = batch_of(0, flip=flip)
    for view, given in zip(views(batch, **{"data.flip": True}), batch[:2], strict=True):
        np.testing.assert_array_equal(view[flip], given[flip][:, :, ::-1])
        np.testing.assert_array_equal(view[~flip], given[~flip])


def test_re_ranking_is_by_what_the_config_says(monkeypatch):
    changes = {"evaluation.rerank_score": "log_odds", "evaluation.rerank_dual_weight": 0.5}
    task = task_on(1, 1, 1, **changes)
    state = jax.device_get(task.init_state(0))
    state = state.replace(student={**state.student, "temperature": np.float32(0.05)})
    given = {}

    def evaluate(*_, **options):
        given.update(options)
        raise StopIteration

    monkeypatch.setattr(pretrain.retrieval, "evaluate", evaluate)
    with pytest.raises(StopIteration):
        task.evaluate(state, SimpleNamespace(kind="pairs"), None, images=0, final=True)
    scoring = given["scoring"]
    assert scoring.cosine_weight == pytest.approx(0.5 / 0.05)
    rng = np.random.default_rng(0)
    tokens, states = (rng.normal(size=s).astype(np.float32) for s in ((3, 10, 16), (3, 2, 7, 16)))
    lengths = np.full((3, 2), 7, np.int32)
    logits = task.model.pair_logits(state.student, tokens, states, lengths)
    odds = logits[..., 1] - logits[..., 0]
    np.testing.assert_allclose(scoring.match(tokens, states, lengths), odds, atol=1e-5)
    match = task.model.match(state.student, tokens, states, lengths)
    np.testing.assert_allclose(match, logits[..., 1], atol=1e-5)
