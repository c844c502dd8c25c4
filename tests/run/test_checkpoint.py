"""Checkpoints: exact, complete or absent, kept by rule, and reported when damaged."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small_run import ROOT, together

from codebook_jax.errors import UserError
from codebook_jax.run.checkpoint import Checkpoints
from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.state import TrainState

ITEMS = Pretraining.checkpoint_items().alone

OPTIMIZER = optax.adamw(1e-3)


def state_of(seed: int, width: int = 7) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 3)
    student = {
        "towers": {"image": {"blocks": jax.random.normal(keys[0], (3, width, 5))}},
        "temperature": jnp.float32(0.07),
    }
    return TrainState(
        step=jnp.int32(seed),
        student=student,
        teacher=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), student["towers"]),
        moments=OPTIMIZER.init(student),
        queue={"image": jax.random.normal(keys[1], (11, 5)), "cursor": jnp.int32(4)},
        usage=jax.random.uniform(keys[2], (13,)),
        bad_in_row=jnp.int32(0),
        bad_total=jnp.int32(2),
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_each(workdir: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(workdir, ITEMS, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"note": f"of {step}"})


def test_a_state_comes_back_bit_for_bit_though_the_next_step_overwrote_its_arrays(tmp_path):
    state = state_of(3)
    before = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, ITEMS, keep=2) as checkpoints:
        checkpoints.save(3, state, {"note": "kept"})
        for _ in range(5):
            state = overwrite(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored = checkpoints.restore_newest(abstract(state))
    assert restored.step == 3 and restored.meta["note"] == "kept"
    assert_same(restored.state, before)


def test_the_newest_and_the_best_in_validation_are_kept(tmp_path):
    scores = {10: 1.0, 20: 9.0, 30: math.nan, 40: 2.0, 50: 3.0, 60: 9.0}
    with Checkpoints(tmp_path, ITEMS, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state_of(step), {})
            checkpoints.record_score(step, score, "a score")
        assert checkpoints.best_step() == 20  # the earliest of equals
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [20, 50, 60]
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["score"], best["metric"]) == (20, 9.0, "a score")
    with Checkpoints(tmp_path, ITEMS, keep=2) as again:
        assert again.best_step() == 20 and again.scores[40] == 2.0 and math.isnan(again.scores[30])


def test_a_step_already_saved_is_not_overwritten(tmp_path):
    with Checkpoints(tmp_path, ITEMS, keep=2) as checkpoints:
        checkpoints.save(7, state_of(1), {})
        with pytest.raises(UserError, match="step 7 .*exists"):
            checkpoints.save(7, state_of(2), {})
        restored = checkpoints.restore_newest(abstract(state_of(1)))
    assert_same(restored.state, state_of(1))


def test_the_folder_of_a_killed_save_does_not_count_and_the_step_can_be_saved_again(tmp_path):
    save_each(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", leftover)
    with Checkpoints(tmp_path, ITEMS, keep=2) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore_newest(abstract(state_of(0))).step == 1
        checkpoints.save(2, state_of(2), {})
    with Checkpoints(tmp_path, ITEMS, keep=2) as checkpoints:
        assert_same(checkpoints.restore_newest(abstract(state_of(0))).state, state_of(2))


def files_in(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "a truncated array": lambda step: os.truncate(largest(step / "moments"), 20),
    "an emptied array": lambda step: os.truncate(largest(step / "teacher" / "d"), 0),
    "a missing array": lambda step: shutil.rmtree(step / "student" / "d"),
    "a missing item": lambda step: shutil.rmtree(step / "queue"),
    "missing words": lambda step: shutil.rmtree(step / "meta"),
    "everything missing": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_good_checkpoint_is_used_and_a_damaged_one_set_aside(damage, tmp_path, capsys):
    save_each(tmp_path, 1, 2, 3)
    DAMAGES[damage](tmp_path / "checkpoints" / "3")
    files = files_in(tmp_path / "checkpoints" / "3")
    with Checkpoints(tmp_path, ITEMS, keep=3) as checkpoints:
        restored = checkpoints.restore_newest(abstract(state_of(0)))
        assert restored.step == 2 and checkpoints.steps() == [1, 2]
        assert_same(restored.state, state_of(2))
        said = capsys.readouterr().out
        assert "step 3 is damaged" in said and "damaged-3" in said
        assert files_in(tmp_path / "checkpoints" / "damaged-3") == files
        checkpoints.save(3, state_of(3), {})  # its place is free again
    with Checkpoints(tmp_path, ITEMS, keep=3) as checkpoints:
        assert_same(checkpoints.restore_newest(abstract(state_of(0))).state, state_of(3))


def test_a_part_that_one_process_alone_cannot_read_is_damaged_for_both_and_neither_waits(
    tmp_path, one_device_environment
):
    command = [sys.executable, str(ROOT / "tests" / "checkpoint_of_two.py"), str(tmp_path)]
    processes = together([command, command], one_device_environment)
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert all("restored 1; there are [1]" in text for text in said)
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()


def test_nothing_is_renamed_when_no_checkpoint_can_be_read(tmp_path):
    save_each(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "student")
    with Checkpoints(tmp_path, ITEMS, keep=3) as checkpoints:
        with pytest.raises(UserError, match="none of the 2 checkpoints .* can be read"):
            checkpoints.restore_newest(abstract(state_of(0)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_another_shape_is_refused_instead_of_padded(tmp_path):
    save_each(tmp_path, 1)
    other = abstract(state_of(0))
    other.student["extra"] = other.student.pop("temperature")
    with Checkpoints(tmp_path, ITEMS, keep=3) as checkpoints:
        with pytest.raises(UserError, match=r"step 1: .*\(3, 8, 5\).*\(3, 7, 5\)"):
            checkpoints.restore_newest(abstract(state_of(0, width=8)))
        with pytest.raises(UserError, match="step 1: .*structures do not match"):
            checkpoints.restore_newest(other)
        assert checkpoints.steps() == [1]


def test_the_student_can_be_read_alone(tmp_path):
    save_each(tmp_path, 1)
    with Checkpoints(tmp_path, ITEMS, keep=3) as checkpoints:
        state = checkpoints.restore(1, abstract(state_of(0)), items=("student",)).state
    assert_same(state.student, state_of(1).student)
    assert state.teacher is None and state.moments is None and state.step is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; skips the test if it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def heavy(seed: int) -> TrainState:
    """1.6 MB of noise: two such states do not fit on the small disk."""
    return state_of(seed).replace(usage=jax.random.normal(jax.random.key(seed), (400_000,)))


def test_a_full_disk_is_said_and_leaves_the_newest_complete_checkpoint(small_disk):
    with pytest.raises(
        UserError, match=r"step 2 could not be written .*No space left.* step 1 is saved"
    ):
        with Checkpoints(small_disk, ITEMS, keep=1) as checkpoints:
            checkpoints.save(1, heavy(1), {})
            checkpoints.save(2, heavy(2), {})  # in the background: it fails when waited for
    with Checkpoints(small_disk, ITEMS, keep=1) as checkpoints:
        assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]
        assert_same(checkpoints.restore_newest(abstract(heavy(0))).state, heavy(1))


def test_a_failed_background_save_surfaces_at_the_next_save(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="step 2 could not be written .*No space left"):
        with Checkpoints(tmp_path, ITEMS, keep=1) as checkpoints:
            checkpoints.save(1, state_of(1), {})
            checkpoints.wait()
            monkeypatch.setattr(checkpoints._manager, "_finalize_checkpoint", full)
            checkpoints.save(2, state_of(2), {})
            checkpoints.save(3, state_of(3), {})
    assert not (tmp_path / "checkpoints" / "3").exists()


def test_a_checkpoint_of_four_devices_is_restored_on_two_and_on_one(tmp_path):
    def placed(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",))
        state = jax.device_put(state_of(1, width=8), NamedSharding(mesh, P()))
        image = state.student["towers"]["image"]
        split = NamedSharding(mesh, P(None, "fsdp", None))
        image["blocks"] = jax.device_put(image["blocks"], split)
        return state

    with Checkpoints(tmp_path, ITEMS, keep=1) as checkpoints:
        checkpoints.save(1, placed(4), {})
        checkpoints.wait()
        for count in (2, 1):
            state = checkpoints.restore_newest(abstract(placed(count))).state
            assert_same(state, placed(count))
            blocks = state.student["towers"]["image"]["blocks"]
            assert len(blocks.sharding.device_set) == count
            assert blocks.addressable_shards[0].data.shape == (3, 8 // count, 5)
