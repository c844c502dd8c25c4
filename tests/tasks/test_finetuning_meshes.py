"""Two steps of every fine-tuning task on eight devices and in two passes are those of one device in
one pass; in bfloat16 they are finite.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden_weights import one_mesh
from small_finetune import TASKS, config_of
from small_task import TOKENS, VOCABULARY, WORDS, assert_close, batch_of, named, run

from codebook_jax import build
from codebook_jax.data.batch import Answers, ExampleBatch
from codebook_jax.parallel import sharding

QUICK = ("entailment", "labels")
ROWS, SIDE = 16, 24
CHANGES = {
    "model.image.size_px": SIDE,
    "model.image.patch_px": 8,
    "model.image.stem": "patch",
    "model.image.depth": 2,
    "model.image.heads": 8,
    "model.text.heads": 8,
    "model.text.max_tokens": TOKENS,
    "data.global_batch": ROWS,
    "data.flip": True,
    "teacher.alpha_steps": 2,
    "optimizer.eps": 1e-3,  # as in small_task
    "optimizer.weight_decay": 0.02,
    "train.steps": 10,
}
OF_TASK = {
    "labels": {"labels.names": ("a", "b", "c"), "teacher.alpha_steps": 0},
    "vqa": {"vqa.answers": 3, "vqa.answer_tokens": 5},
    "retrieval": {"itm.groups": 8, "queue.size": 40},
    "grounding": {"itm.groups": 8, "queue.size": 40},
}


def task_on(name, mesh, **changes):
    config = config_of(name, **CHANGES | OF_TASK.get(name, {}) | changes)
    return build.TASKS[name](config, VOCABULARY, mesh)


def batches_of(task):
    """Two batches; of examples, some pictures are mirrored, and some questions lack answers."""
    pairs = [batch_of(seed) for seed in range(2)]
    if not isinstance(task.abstract_batch(), ExampleBatch):
        return pairs
    made, spec = [], task.batch_spec()
    for seed, pair in enumerate(pairs):
        draw = np.random.default_rng(seed)
        shape = (ROWS, task.images, SIDE, SIDE, 3)
        images, flip = draw.integers(0, 256, shape).astype(np.uint8), draw.random(ROWS) < 0.5
        target = draw.integers(0, max(1, len(spec.labels)), ROWS).astype(np.int32)
        if not spec.labels:
            tokens = draw.integers(5, WORDS, (ROWS, spec.answers, spec.answer_tokens))
            tokens[..., 0], tokens[:, 0, -1] = VOCABULARY.cls_id, VOCABULARY.pad_id
            weight = draw.random((ROWS, spec.answers)) * (draw.random((ROWS, 1)) < 0.8)
            target = Answers(tokens.astype(np.int32), weight.astype(np.float32))
        rest = pair.tokens, pair.text_length, target, pair.example, pair.skipped
        made.append(ExampleBatch(images, flip, *rest))
    return made


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TASKS
    ],
)
def one(request):
    """The fresh state and two steps on one device."""
    task = task_on(request.param, one_mesh())
    first, batches = jax.device_get(task.init_state(0)), batches_of(task)
    states, scalars = run(task, first, batches)
    return SimpleNamespace(
        name=request.param, first=first, batches=batches, states=states, scalars=scalars
    )


def assert_steps_are_those_of_one(task, one):
    states, scalars = run(task, one.first, one.batches)
    for step, (found, expected) in enumerate(zip(scalars, one.scalars, strict=True)):
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {step}"
            )
    assert_close(states[0].moments, one.states[0].moments, rtol=1e-4)  # the first gradients
    for part in ("student", "teacher"):
        expected = named(getattr(one.states[1], part))
        for name, leaf in named(getattr(states[1], part)).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_all_that_is_trained_moves_and_every_loss_is_finite(one):
    assert all(np.isfinite(scalars["loss"]) and scalars["loss"] > 0 for scalars in one.scalars)
    assert not any(scalars["bad_step"] for scalars in one.scalars)
    after = named(one.states[1].student)
    moved = {name: np.abs(x - after[name]).max() for name, x in named(one.first.student).items()}
    still = {name for name, by in moved.items() if by == 0}
    if one.name == "labels":
        assert still == {name for name in moved if name.startswith("towers/")}
    elif one.name in ("retrieval", "grounding"):
        unused = ("codebook", "masked_words")  # their losses have no weight
        assert not [name for name in still if not any(part in name for part in unused)]
    else:
        assert not still


def test_eight_devices_in_two_passes_make_the_steps_of_one_in_one_pass(one):
    mesh = sharding.make_mesh(2, 2, 2)
    assert_steps_are_those_of_one(task_on(one.name, mesh, **{"optimizer.accumulation": 2}), one)


@pytest.mark.slow
def test_eight_data_shards_make_the_steps_of_one_device(one):
    assert_steps_are_those_of_one(task_on(one.name, sharding.make_mesh(8, 1, 1)), one)


@pytest.mark.slow
def test_bfloat16_gives_the_loss_of_float32_to_its_precision(one):
    task = task_on(one.name, one_mesh(), **{"model.dtype": "bfloat16"})
    _, scalars = run(task, one.first, one.batches)
    for found, expected in zip(scalars, one.scalars, strict=True):
        assert not found["bad_step"]
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0.05)
    assert scalars[0]["loss"] != one.scalars[0]["loss"] or one.name == "labels"
