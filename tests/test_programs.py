"""Compiled programs are kept for the next start, where and as long as the user wants that."""

import sys

import filelock
import numpy as np
import pytest
from small_run import command, ran

from codebook_jax import programs
from codebook_jax.errors import UserError
from codebook_jax.run.metrics import read_rows

SHORT = {
    "train.steps": 3,
    "evaluation.every_steps": 0,
    "evaluation.rerank_top_k": 0,
    "losses.matching": 0,
    "losses.masked_lm": 0,
    "model.text.fusion_depth": 0,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a user who has set nothing but where caches are."""
    for name in (programs.FOLDER, programs.SWITCH, *programs.LIMITS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "codebook_jax" / "xla"


def test_a_second_start_compiles_nothing_and_learns_the_same(
    one_device_environment, folder, tmp_path
):
    environment = one_device_environment | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in (programs.FOLDER, *programs.LIMITS):
        environment.pop(name, None)
    rows, kept = [], []
    for workdir in (tmp_path / "first", tmp_path / "second"):
        done = ran(command(workdir, **SHORT), environment)
        assert done.returncode == 0, done.stderr[-3000:]
        rows.append(
            [
                {name: value for name, value in row.items() if not name.startswith("time/")}
                for row in read_rows(workdir / "metrics.jsonl")
            ]
        )
        kept.append({path.name: path.read_bytes() for path in folder.glob("*-*time")})
    first, second = kept
    assert any("jit_update" in name for name in first)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)  # JAX notes when it reads one
    np.testing.assert_equal(*rows)


def test_settings_of_the_user_win(folder, monkeypatch):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.setenv(name, "5")
    found = programs.environment(alone=True)
    assert found[programs.FOLDER] == str(folder)
    assert name not in found


@pytest.mark.parametrize("name, value", [(programs.SWITCH, "False"), (programs.FOLDER, "")])
def test_nothing_is_kept_if_jax_is_told_so(name, value, folder, monkeypatch):
    monkeypatch.setenv(name, value)
    assert programs.environment(alone=True) == {}
    assert not folder.exists()


def test_one_of_several_processes_keeps_no_programs_of_its_own(folder):
    assert programs.environment(alone=False) == {}


def test_a_named_folder_that_cannot_be_made_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(programs.FOLDER, str(tmp_path / "file" / "inside"))
    with pytest.raises(UserError, match="file/inside cannot be made"):
        programs.environment(alone=False)


def test_without_a_place_to_write_the_run_goes_on_and_says_so(
    folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "codebook_jax").touch()
    assert programs.environment(alone=True) == {}
    said = capsys.readouterr().err
    assert str(folder) in said or str(folder.parent) in said
    assert said.count("\n") == 1


def test_a_user_without_a_home_keeps_nothing(folder, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(programs.Path, "home", no_home)
    assert programs.environment(alone=True) == {}
    assert "home directory" in capsys.readouterr().err


def test_a_user_whom_the_system_does_not_know_keeps_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(programs.os, "getuid", lambda: 54_321)
    assert programs.environment(alone=True) == {}
    assert "54321" in capsys.readouterr().err


def test_a_folder_whose_lock_another_process_keeps_is_not_waited_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(programs, "PATIENCE_S", 0.05)
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lockfile"):
        assert programs.environment(alone=True) == {}
    assert ".lockfile" in capsys.readouterr().err


def test_a_program_that_was_half_written_is_removed(folder):
    folder.mkdir(parents=True)
    for name in ("jit_whole-1-cache", "jit_whole-1-atime", "jit_half-2-cache"):
        (folder / name).write_bytes(b"x")
    programs.environment(alone=True)
    assert {path.name for path in folder.glob("jit*")} == {"jit_whole-1-cache", "jit_whole-1-atime"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_compiling_took_goes_back_to_the_system():
    cycle = [[bytes(1000) for _ in range(300_000)], None]  # blocks that free() would keep
    above = bytes(1000)  # one at the end of the heap
    cycle[1] = cycle
    del cycle
    before = resident_mb()
    programs.release()
    assert above and resident_mb() < before - 200


def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmRSS"))
