"""Which fsdp a run gets by the rule, what a restart keeps, and where devices of several slices
stand.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import SMALL
from test_memory import GB, Formula, formula

from codebook_jax import build
from codebook_jax.errors import UserError
from codebook_jax.parallel import axes, memory, sharding, slices
from codebook_jax.run.record import read_record
from configs import base


class Sixteen(Formula):
    """A planner for 16 GB of state split by fsdp and 4 GB besides, whatever the batch."""

    def estimate(self, changes=None):
        mesh = self.with_changes(changes or {})[1]
        self.asked = [*getattr(self, "asked", []), mesh.shape["fsdp"]]
        return memory.Estimate(16 * GB // mesh.shape["fsdp"], 0, 0, 0, 0, 4 * GB)


def choose(has, monkeypatch, **changes):
    """The config with the rule's choice for this much memory per device, the planner, and the
    printed lines.
    """
    said = []
    monkeypatch.setattr(axes, "say", said.append)
    monkeypatch.setattr(memory, "device_memory", lambda: has)
    planner = formula(changes=changes)
    planner = Sixteen(planner.config, planner.create, 211)
    return axes.chosen(planner.config, planner), planner, said


@pytest.mark.parametrize(
    ("has", "fsdp"), [(22, 1), (21, 2), (13, 2), (12, 4), (9, 4), (8, 8), (3, 8)]
)  # with a twentieth left over: 21, 12.6, 8.4, 6.3
def test_the_smallest_fsdp_that_fits_is_taken_and_what_needs_least_where_none_does(
    has, fsdp, monkeypatch
):
    config, planner, said = choose(has * GB, monkeypatch)
    assert dict(config.mesh) == {"data": -1, "fsdp": fsdp, "tensor": 1, "slices": 0}
    assert planner.config.mesh.fsdp == fsdp
    assert planner.asked == [n for n in (1, 2, 4, 8) if n <= fsdp]
    (sentence,) = said
    assert sentence.startswith(f"config.mesh.fsdp={fsdp}, chosen: needs ")
    assert f"{16 / fsdp + 4:.1f} GB" in sentence and f"{has}.0 GB" in sentence


def test_the_sizes_passed_over_are_said_with_what_they_need(monkeypatch):
    (sentence,) = choose(12 * GB, monkeypatch)[2]
    assert "config.mesh.fsdp=4" in sentence
    assert re.findall(r"[\d.]+ GB", sentence) == ["8.0 GB", "12.0 GB", "20.0 GB", "12.0 GB"]
    assert re.search(r"\b1 [a-z ]*20\.0 GB, 2 [a-z ]*12\.0 GB", sentence)


def test_nothing_is_estimated_where_there_is_nothing_to_choose(monkeypatch):
    for changes, fsdp, words in (
        ({"mesh.tensor": 8}, 1, 0),
        ({"mesh.data": 2}, 4, 0),
        ({"mesh.fsdp": 2}, 2, 0),
    ):
        config, planner, said = choose(3 * GB, monkeypatch, **changes)
        assert config.mesh.fsdp == fsdp and len(said) == words and not hasattr(planner, "asked")
    config, planner, said = choose(None, monkeypatch)
    assert config.mesh.fsdp == 1 and not hasattr(planner, "asked")
    assert "not known" in said[0]


def test_the_choice_does_not_change_what_the_batch_is_split_over(monkeypatch):
    shards = {
        sharding.data_shards(
            sharding.mesh_of(choose(has * GB, monkeypatch, **{"mesh.tensor": 2})[0].mesh)
        )
        for has in (22, 13, 9)
    }
    assert shards == {4}


def test_an_fsdp_inside_a_slice_comes_before_one_across():
    mesh = SimpleNamespace(
        shape={"data": 12, "fsdp": 1, "tensor": 1},
        devices=np.array(fakes([0] * 4 + [1] * 4 + [2] * 4)),
    )
    assert axes.possible(mesh, 0) == [1, 2, 4, 3, 6, 12]
    mesh = SimpleNamespace(
        shape={"data": 12, "fsdp": 1, "tensor": 1}, devices=np.array(fakes([0] * 12))
    )
    assert axes.possible(mesh, 0) == [1, 2, 3, 4, 6, 12]


def record_of(**mesh):
    return {"config": {"mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": 0} | mesh}}


def config_of(**mesh):
    config = base.get_config("tiny")
    config.mesh.update(mesh)
    return config


def test_a_restart_keeps_its_own_fsdp_where_the_devices_make_up_such_a_mesh():
    assert axes.kept(config_of(), record_of(fsdp=4)).mesh.fsdp == 4
    assert axes.kept(config_of(), record_of(fsdp=3)).mesh.fsdp == 0
    assert axes.kept(config_of(tensor=4), record_of(fsdp=4)).mesh.fsdp == 0
    assert axes.kept(config_of(fsdp=2), record_of(fsdp=4)).mesh.fsdp == 2
    assert axes.kept(config_of(), None).mesh.fsdp == 0


def test_a_trained_run_is_used_on_its_own_mesh_or_on_what_the_devices_leave_of_it():
    used = lambda config, record, asked: dict(axes.of_trained(config, record, asked=asked).mesh)  # noqa: E731
    own = config_of(fsdp=2, tensor=2)
    assert used(own, record_of(fsdp=2, tensor=2), False) == {
        "data": -1,
        "fsdp": 2,
        "tensor": 2,
        "slices": 0,
    }
    assert used(config_of(), record_of(fsdp=4), True) == {
        "data": -1,
        "fsdp": 4,
        "tensor": 1,
        "slices": 0,
    }
    elsewhere = {"data": 3, "fsdp": 12, "tensor": 4, "slices": 3}
    assert used(config_of(**elsewhere), record_of(**elsewhere), False) == {
        "data": -1,
        "fsdp": 4,
        "tensor": 1,
        "slices": 0,
    }
    assert (
        used(config_of(fsdp=3), record_of(fsdp=4), True)["fsdp"] == 3
    )  # asked for: refused with its numbers
    assert used(config_of(), record_of(fsdp=0), False)["fsdp"] == 0  # imported, never trained: one


def test_a_run_records_its_choice_starts_again_with_it_and_is_used_with_it(
    monkeypatch, tmp_path, capsys
):
    config = base.get_config("tiny")
    config.update_from_flattened_dict(SMALL | {"data.global_batch": 16, "model.text.width": 64})
    has = lambda count: monkeypatch.setattr(memory, "device_memory", lambda: count)  # noqa: E731
    has(100 * GB)
    parts = build.build_training(config, tmp_path / "large", steps_saved=[])
    assert parts.config.mesh.fsdp == 1 == read_record(tmp_path / "large")["config"]["mesh"]["fsdp"]
    needs = {n: parts.planner.estimate({"mesh.fsdp": n}).total for n in (1, 2)}
    has(int((needs[1] + needs[2]) / 2 / (1 - memory.MARGIN)))
    workdir = tmp_path / "small"
    parts = build.build_training(config, workdir, steps_saved=[])
    assert parts.config.mesh.fsdp == parts.mesh.shape["fsdp"] == 2
    assert read_record(workdir)["config"]["mesh"]["fsdp"] == 2
    capsys.readouterr()
    build.announce(parts)
    said = capsys.readouterr().out
    assert "mesh data 4, fsdp 2, tensor 1\n" in said and "feed-forward" in said
    has(100 * GB)  # more is free now
    parts = build.build_training(config, workdir, steps_saved=[])
    assert parts.config.mesh.fsdp == parts.mesh.shape["fsdp"] == parts.planner.config.mesh.fsdp == 2
    assert "chosen" not in capsys.readouterr().out and read_record(workdir)["changes"] == []
    assert build.build_trained(None, workdir).mesh.shape["fsdp"] == 2
    assert build.build_trained(config, workdir).mesh.shape["fsdp"] == 2
    has(1000)
    with pytest.raises(UserError, match="training needs .* has 0 MB"):  # its own, and not another
        build.build_training(config, workdir, steps_saved=[])


# -- slices


def fakes(slice_of):
    """Devices that report their slice, two per process."""
    return [
        SimpleNamespace(
            id=place,
            slice_index=index,
            process_index=place // 2,
            platform="fake",
            device_kind="fake",
        )
        for place, index in enumerate(slice_of)
    ]


def slices_along(placed, axis):
    """The most slices among devices that differ only in this axis."""
    index = np.vectorize(lambda device: device.slice_index)(placed)
    lines = np.moveaxis(index, axis, -1).reshape(-1, placed.shape[axis])
    return max(len(set(line)) for line in lines)


@pytest.mark.parametrize(
    ("sizes", "across"),
    [
        ((2, 2, 2), (2, 1, 1)),
        ((4, 2, 1), (2, 1, 1)),
        ((2, 1, 4), (2, 1, 1)),
        ((1, 8, 1), (1, 2, 1)),
        ((1, 2, 4), (1, 2, 1)),
    ],
)
@pytest.mark.parametrize("order", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1] * 4, [1, 1, 0, 0, 0, 0, 1, 1]])
def test_the_slow_network_carries_data_first_then_fsdp_and_never_tensor(sizes, across, order):
    devices = fakes(order)
    placed = slices.arranged(sizes, devices)
    assert placed.shape == sizes and {device.id for device in placed.flat} == set(range(8))
    assert tuple(slices_along(placed, axis) for axis in range(3)) == across


def test_what_data_leaves_of_the_slices_is_split_by_fsdp():
    placed = slices.arranged((2, 4, 2), fakes([place // 4 for place in range(16)]))
    assert [slices_along(placed, axis) for axis in range(3)] == [2, 2, 1]


def test_devices_in_order_are_split_into_as_many_slices_as_asked_for():
    devices = fakes([0] * 8)
    assert slices.arranged((2, 2, 2), devices) is None  # one slice: JAX orders it
    placed = slices.arranged((4, 2, 1), devices, 2)
    assert [device.id for device in placed[:2].flat] == [0, 1, 2, 3]
    nodes = fakes([0, 0, 0, 0, 1, 1, 1, 1])
    assert [device.id for device in slices.arranged((1, 1, 8), nodes, 1).flat] == list(range(8))


def test_a_process_holds_rows_that_follow_one_another():
    placed = slices.arranged((4, 2, 1), fakes([0, 0, 0, 0, 1, 1, 1, 1]))
    process = np.vectorize(lambda device: device.process_index)(placed).ravel()
    assert process.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("sizes", "order", "asked", "words"),
    [
        (
            (1, 1, 8),
            [0] * 4 + [1] * 4,
            0,
            r"config.mesh.data=1 x config.mesh.fsdp=1 is not a multiple of the 2 slices of 4",
        ),
        (
            (1, 2, 4),
            [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2,
            0,
            r"4 slices of 2 devices, and config.mesh.tensor=4",
        ),
        ((8, 1, 1), [0] * 3 + [1] * 5, 0, "3, 5 devices"),
        ((8, 1, 1), [0] * 8, 3, "config.mesh.slices=3 does not split 8 devices"),
        ((8, 1, 1), [0] * 8, -1, "config.mesh.slices=-1 does not split 8 devices"),
    ],
)
def test_a_mesh_that_slices_cannot_make_is_refused_with_its_numbers(sizes, order, asked, words):
    with pytest.raises(UserError, match=words):
        slices.arranged(sizes, fakes(order), asked)


def test_a_mesh_over_slices_says_what_crosses_them():
    assert axes.said(sharding.make_mesh(2, 2, 2), 0) == "data 2, fsdp 2, tensor 2"
    assert (
        axes.said(sharding.make_mesh(1, 4, 2, slices=2), 2)
        == "data 1, fsdp 4, tensor 2; over 2 slices: fsdp 2"
    )
