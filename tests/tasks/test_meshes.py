"""Two steps on every kind of mesh, in one pass and in two, equal those of one device: scalars,
gradient, parameters.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from small_task import CONFIG, VOCABULARY, assert_close, batch_of, named, run

from codebook_jax.parallel import sharding
from codebook_jax.tasks import pretrain
from configs import base

DIVIDES_EIGHT_WAYS = {
    "model.image.heads": 8,
    "model.text.heads": 8,
    "model.image.depth": 2,
    "codebook.size": 16,
}
BATCHES = [batch_of(seed) for seed in range(2)]


def task_on(mesh, **changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(CONFIG | DIVIDES_EIGHT_WAYS | changes)
    return pretrain.Pretraining(config, VOCABULARY, mesh)


@pytest.fixture(scope="module")
def one():
    """The fresh state and two steps on one device, all losses in one pass."""
    mesh = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3
    )
    task = task_on(mesh)
    first = jax.device_get(task.init_state(0))
    states, scalars = run(task, first, BATCHES)
    return SimpleNamespace(first=first, states=states, scalars=scalars)


def assert_steps_are_those_of_one(task, one):
    """Also gives {name: shape of the part on every device} after the second step."""
    state, states = jax.device_put(one.first, task.shardings), []
    for step, (batch, expected) in enumerate(zip(BATCHES, one.scalars, strict=True)):
        state, found = task.step(state, sharding.put_batch(batch, task.mesh))
        states.append(jax.device_get(state))
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {step}"
            )
    # The first moments after one step are the gradients, times a tenth.
    assert_close(states[0].moments, one.states[0].moments, rtol=1e-4)
    for part in ("student", "teacher", "queue"):
        expected = named(getattr(one.states[1], part))
        for name, leaf in named(getattr(states[1], part)).items():
            np.testing.assert_allclose(
                leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{part}/{name}"
            )
    held = {}
    for name, leaf in named(state).items():
        (held[name],) = {shard.data.shape for shard in leaf.addressable_shards}
    return held


def parts_of(held, name):
    """Shapes on a device of a tower's array: in student, teacher and both moments."""
    return [shape for other, shape in held.items() if other.endswith(f"/{name}")]


def test_every_loss_is_in_the_steps_compared(one):
    losses = {"loss/alignment", "loss/codebook", "loss/matching", "loss/masked_lm"}
    assert losses <= one.scalars[1].keys() and all(one.scalars[1][name] > 0 for name in losses)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.first.student, one.states[1].student)
    assert min(jax.tree.leaves(moved)) > 1e-5  # so that what does not move is seen


def test_eight_devices_that_share_one_copy_make_the_steps_of_one_and_hold_an_eighth_each(one):
    held = assert_steps_are_those_of_one(task_on(sharding.make_mesh(1, 8, 1)), one)
    assert parts_of(held, "image/blocks/mlp/up/kernel") == [(2, 16 // 8, 64)] * 4
    assert parts_of(held, "image/blocks/attention/qkv/kernel") == [(2, 16 // 8, 3, 8, 2)] * 4
    assert parts_of(held, "fusion/blocks/cross/out/kernel") == [(1, 8, 2, 16 // 8)] * 4
    assert parts_of(held, "text/words") == [(40, 16 // 8)] * 4
    assert held["queue/image"] == held["queue/text"] == (40, 8) and held[
        "student/codebook/codes"
    ] == (16, 8)


def test_eight_devices_that_split_every_layer_make_the_steps_of_one_and_hold_a_part_of_the_queues(
    one,
):
    held = assert_steps_are_those_of_one(task_on(sharding.make_mesh(1, 1, 8)), one)
    assert parts_of(held, "image/blocks/mlp/up/kernel") == [(2, 16, 64 // 8)] * 4
    assert parts_of(held, "image/blocks/attention/qkv/kernel") == [(2, 16, 3, 8 // 8, 2)] * 4
    assert held["queue/image"] == held["queue/text"] == (40 // 8, 8)
    assert held["student/codebook/codes"] == (16 // 8, 8)


@pytest.mark.slow
def test_two_steps_on_data_and_tensor_are_those_of_one_device(one):
    assert_steps_are_those_of_one(task_on(sharding.make_mesh(4, 1, 2)), one)


def test_two_steps_on_two_slices_are_those_of_one_device(one, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)  # so that all solve the transport together
    devices = jax.devices()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices[::2] + devices[1::2])
        mesh = sharding.make_mesh(2, 4, 1, slices=2)
    assert [device.id for device in mesh.devices[1].flat] == [1, 3, 5, 7]
    assert_steps_are_those_of_one(task_on(mesh), one)


def test_two_passes_on_a_mesh_of_all_three_axes_are_one_pass_on_one_device(one):
    task = task_on(sharding.make_mesh(2, 2, 2), **{"optimizer.accumulation": 2})
    held = assert_steps_are_those_of_one(task, one)
    assert parts_of(held, "image/blocks/mlp/up/kernel") == [(2, 16 // 2, 64 // 2)] * 4
