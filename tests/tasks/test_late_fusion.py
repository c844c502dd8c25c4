"""configs/clip.py: what is not used is not kept; loss and gradient are CLIP's on any mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from small_task import CONFIG, VOCABULARY, assert_close, batch_of, named, run, task_on

from codebook_jax.errors import UserError
from codebook_jax.method.numerics import own_settings
from codebook_jax.parallel import sharding
from codebook_jax.tasks import limits, pretrain
from configs import base, clip

OFF = ("losses.matching", "model.text.fusion_depth", "codebook.size", "queue.size")
BATCHES = [batch_of(seed) for seed in range(2)]
NO_TEACHER = {"teacher.use": False, "queue.size": 0}


def clip_on(mesh, **changes):
    config = clip.get_config("tiny")
    sizes = {name: value for name, value in CONFIG.items() if name not in OFF}
    config.update_from_flattened_dict(sizes | {"model.text.depth": 2} | changes)
    return pretrain.Pretraining(config, VOCABULARY, mesh)


def mesh_of(*sizes):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def one():
    """The task on one device, its fresh state, and two steps."""
    task = clip_on(mesh_of(1, 1, 1))
    first = jax.device_get(task.init_state(0))
    return task, first, *run(task, first, BATCHES)


def test_a_part_that_is_not_used_has_no_array_in_the_state(one):
    state = one[1]
    assert state.teacher is state.queue is state.usage is state.running is None
    assert state.student.keys() == {"towers", "temperature"}
    both = {"image", "text"}
    assert state.student["towers"].keys() == both | {f"{name}_projection" for name in both}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    student = sum(leaf.nbytes for leaf in jax.tree.leaves(state.student))
    assert size <= 3 * student + 5 * 4  # it, its two moments, and five counts


def double_clip(image, text, temperature):
    """CLIP's loss in float64 (Radford et al. 2021, figure 3), and its gradients by both features
    and by the temperature.
    """
    image, text, temperature = (np.asarray(x, np.float64) for x in (image, text, temperature))
    logits, own = image @ text.T / temperature, np.eye(len(image))
    rows, columns = (np.exp(logits - logits.max(axis, keepdims=True)) for axis in (1, 0))
    rows, columns = rows / rows.sum(1, keepdims=True), columns / columns.sum(0, keepdims=True)
    loss = -np.mean([np.log(np.diag(share)) for share in (rows, columns)])
    by_logits = (rows + columns - 2 * own) / (2 * len(own))
    by_features = by_logits @ text / temperature, by_logits.T @ image / temperature
    return loss, by_features, -np.sum(by_logits * logits) / temperature


def test_the_loss_and_its_gradient_in_every_parameter_are_clips(one):
    task, first, states, scalars = one

    def features(parameters, batch):
        towers = task.model.towers(parameters)
        image = towers.embed_images(task.model.pixels(batch.image))[0]
        return image, towers.embed_texts(batch.tokens, batch.text_length)[0]

    @jax.jit
    @own_settings
    def pulled(parameters, batch, by_features):
        return jax.vjp(lambda given: features(given, batch), parameters)[1](by_features)[0]

    see = jax.jit(own_settings(features))
    for state, batch, found in zip([first, *states], BATCHES, scalars, strict=False):
        seen = see(state.student["towers"], batch)
        loss, by_features, by_temperature = double_clip(*seen, state.student["temperature"])
        np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
        if state is first:
            gradient = pulled(state.student["towers"], batch, jax.tree.map(np.float32, by_features))
            expected = named({"towers": gradient, "temperature": np.float32(by_temperature)})
    # the first moments after one step are the gradient, times a tenth
    parts = (name.partition("/mu/")[2] for name in named(states[0].moments))
    moments = dict(zip(parts, named(states[0].moments).values(), strict=True))
    assert_close({name: 10 * moments[name] for name in expected}, expected, rtol=1e-4)
    names = {"loss", "loss/alignment", "gradient_norm", "features/std", "temperature"}
    assert scalars[0].keys() == names | {"learning_rate", "bad_step", "bad_in_row", "bad_total"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes, passes", [((8, 1, 1), 1), ((2, 2, 2), 2)])
def test_steps_on_eight_devices_in_one_pass_and_in_two_are_those_of_one_device(one, sizes, passes):
    _, first, states, scalars = one
    task = clip_on(mesh_of(*sizes), **{"optimizer.accumulation": passes})
    others, found = run(task, first, BATCHES)
    for step, expected in enumerate(scalars):
        np.testing.assert_allclose(found[step]["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            found[step]["gradient_norm"], expected["gradient_norm"], rtol=1e-4
        )
    for name, leaf in named(others[-1].student).items():
        np.testing.assert_allclose(leaf, named(states[-1].student)[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_without_a_teacher_every_other_loss_is_that_of_a_teacher_who_equals_the_student():
    plain = {"teacher.alpha": 0.0, "alignment.intra_weight": 0.0, "data.teacher_view": "same"}
    first = batch_of(0)
    batch = first._replace(teacher_image=first.image)
    found = []
    for changes in ({}, NO_TEACHER):
        task = task_on(1, 1, 1, **plain, **changes)
        states, (scalars,) = run(task, task.init_state(0), [batch])
        found.append({n: x for n, x in scalars.items() if n.startswith(("loss", "codebook/"))})
        assert (states[0].teacher is None) == (states[0].queue is None) == bool(changes)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("form", "field", "value"),
    [
        ("albef", "model.pool", "mean"),
        ("albef", "model.image.stem", "conv"),
        ("huggingface", "model.image.stem", "conv"),
    ],
)
def test_a_format_without_a_place_for_a_part_is_refused(form, field, value):
    config = base.paper("tiny")
    config.update_from_flattened_dict({"export.format": form, field: value})
    with pytest.raises(UserError, match=f"export.format='{form}' .*config.{field}='{value}'"):
        limits.check_export(config)
    config.export.format = "codis"
    limits.check_export(config)
