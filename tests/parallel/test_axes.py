"""Which fsdp a run gets by the rule, what a restart keeps, and where devices of several slices
stand.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from small_run import SMALL

from codebook_jax import build, summary
from codebook_jax.errors import UserError
from codebook_jax.parallel import memory, sharding
from codebook_jax.run.record import read_record
from configs import base


def axes_with(**mesh):
    config = base.paper("tiny")
    config.mesh.update(mesh)
    return config.mesh


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ({}, [1, 2, 4, 8]),
        ({"tensor": 2}, [1, 2, 4]),
        ({"slices": 2}, [1, 2, 4, 8]),
        ({"tensor": 8}, [1]),
        ({"data": 2}, [4]),
        ({"fsdp": 2}, [2]),
    ],
)
def test_fsdp_is_a_divisor_of_the_data_shards_unless_the_mesh_leaves_no_choice(mesh, sizes):
    assert sharding.fsdp_choices(axes_with(**mesh)) == sizes


def test_an_fsdp_inside_a_slice_comes_before_one_across(monkeypatch):
    devices = np.array(fakes([0] * 4 + [1] * 4 + [2] * 4))
    mesh = SimpleNamespace(shape={"data": 12, "fsdp": 1, "tensor": 1}, devices=devices)
    monkeypatch.setattr(sharding, "mesh_of", lambda axes: mesh)
    assert sharding.fsdp_choices(axes_with()) == [1, 2, 4, 3, 6, 12]


@pytest.mark.parametrize(
    ("mesh", "own", "asked", "used"),
    [
        ({"fsdp": 2, "tensor": 2}, 2, False, (-1, 2, 2, 0)),
        ({}, 4, True, (-1, 4, 1, 0)),
        ({"data": 3, "fsdp": 12, "tensor": 4, "slices": 3}, 12, False, (-1, 4, 1, 0)),
        ({"fsdp": 3}, 4, True, (-1, 3, 1, 0)),  # asked for: refused later, with its numbers
        ({}, 0, False, (-1, 0, 1, 0)),  # imported, never trained
    ],
)
def test_a_trained_run_is_used_on_its_own_mesh_or_on_what_the_devices_leave_of_it(
    mesh, own, asked, used
):
    found = sharding.axes_of_trained(axes_with(**mesh), own, asked=asked)
    assert found == dict(zip(("data", "fsdp", "tensor", "slices"), used, strict=True))


def test_a_run_records_its_choice_starts_again_with_it_and_is_used_with_it(
    monkeypatch, tmp_path, capsys
):
    config = base.paper("tiny")
    config.update_from_flattened_dict(
        SMALL | {"data.global_batch": 16, "train.memory_check": False, "model.remat": "auto"}
    )
    has = lambda count: monkeypatch.setattr(memory, "device_memory", lambda: count)  # noqa: E731
    need = memory.Need(0, 0, 0)
    monkeypatch.setattr(memory.Memory, "compile", lambda self, t: memory.Compiled(t, None, need))
    has(1_000_000)  # of which the state is more than half
    parts = build.build_training(config, tmp_path, steps_saved=[])
    fsdp = parts.config.mesh.fsdp
    assert fsdp > 1 and fsdp == parts.mesh.shape["fsdp"]
    assert parts.compiled.task is parts.task
    assert read_record(tmp_path)["config"]["mesh"]["fsdp"] == fsdp
    assert read_record(tmp_path)["config"]["model"]["remat"] == "blocks"
    capsys.readouterr()
    summary.announce(parts)
    printed = capsys.readouterr().out
    assert f"mesh data {8 // fsdp}, fsdp {fsdp}, tensor 1\n" in printed and "- x fsdp" in printed
    assert "warning: config.itm.groups=8 splits" in printed and "groups of 2 pairs" in printed
    has(10**11)  # more is free now
    assert build.build_trained(None, tmp_path).mesh.shape["fsdp"] == fsdp
    assert build.build_trained(config, tmp_path).mesh.shape["fsdp"] == fsdp
    parts = build.build_training(config, tmp_path, steps_saved=[])
    assert parts.config.mesh.fsdp == parts.mesh.shape["fsdp"] == fsdp
    assert "chosen" not in capsys.readouterr().out and read_record(tmp_path)["changes"] == []


# -- slices


def fakes(slice_of):
    """Devices that report their slice, two per process."""
    kind = {"platform": "fake", "device_kind": "fake"}
    return [
        SimpleNamespace(id=place, slice_index=index, process_index=place // 2, **kind)
        for place, index in enumerate(slice_of)
    ]


def slices_along(placed, axis):
    """The most slices among devices that differ only in this axis."""
    index = np.vectorize(lambda device: device.slice_index)(placed)
    lines = np.moveaxis(index, axis, -1).reshape(-1, placed.shape[axis])
    return max(len(set(line)) for line in lines)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (2, 1, 4), (1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize("order", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1] * 4, [1, 1, 0, 0, 0, 0, 1, 1]])
def test_the_slow_network_carries_data_first_then_fsdp_and_never_tensor(sizes, order):
    devices = fakes(order)
    placed = sharding.arranged(sizes, devices)
    assert placed.shape == sizes and {device.id for device in placed.flat} == set(range(8))
    across = [1, 2, 1] if sizes[0] == 1 else [2, 1, 1]
    assert [slices_along(placed, axis) for axis in range(3)] == across


def test_what_data_leaves_of_the_slices_is_split_by_fsdp():
    placed = sharding.arranged((2, 4, 2), fakes([place // 4 for place in range(16)]))
    assert [slices_along(placed, axis) for axis in range(3)] == [2, 2, 1]


def test_devices_in_order_are_split_into_as_many_slices_as_asked_for():
    devices = fakes([0] * 8)
    assert sharding.arranged((2, 2, 2), devices) is None  # one slice: JAX orders it
    placed = sharding.arranged((4, 2, 1), devices, 2)
    assert [device.id for device in placed[:2].flat] == [0, 1, 2, 3]
    nodes = fakes([0, 0, 0, 0, 1, 1, 1, 1])
    assert [device.id for device in sharding.arranged((1, 1, 8), nodes, 1).flat] == list(range(8))


def test_a_process_holds_rows_that_follow_one_another():
    placed = sharding.arranged((4, 2, 1), fakes([0, 0, 0, 0, 1, 1, 1, 1]))
    process = np.vectorize(lambda device: device.process_index)(placed).ravel()
    assert process.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("sizes", "order", "asked", "words"),
    [
        ((1, 1, 8), [0] * 4 + [1] * 4, 0, "mesh.data=1 x config.mesh.fsdp=1 .* the 2 slices of 4"),
        (
            (1, 2, 4),
            [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2,
            0,
            r"4 slices of 2 devices, and config.mesh.tensor=4",
        ),
        ((8, 1, 1), [0] * 3 + [1] * 5, 0, "slices of 3, 5 devices"),
        ((8, 1, 1), [0] * 8, 3, "config.mesh.slices=3 means slices of 3, 3, 2 devices"),
    ],
)
def test_a_mesh_that_slices_cannot_make_is_refused_with_its_numbers(sizes, order, asked, words):
    with pytest.raises(UserError, match=words):
        sharding.arranged(sizes, fakes(order), asked)


def test_a_mesh_over_slices_says_what_crosses_them():
    said = sharding.described_axes(sharding.make_mesh(1, 4, 2, slices=2), 2)
    assert said == "data 1, fsdp 4, tensor 2; over 2 slices: fsdp 2"
