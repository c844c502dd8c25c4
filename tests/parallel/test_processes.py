"""Two real processes over gloo, and runs continued on other numbers of devices, against one process
that never stopped.

All have the same eight, four or two virtual devices on a mesh of data shards; matching draws its
negatives from the same two groups, so the result does not depend on the split.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import command, ran, together

from codebook_jax.run.metrics import read_rows
from codebook_jax.run.ownership import owned

STEPS = 12
CHANGES = {
    "data.global_batch": 16,
    "itm.groups": 2,
    "train.steps": STEPS,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 10,
    "evaluation.every_steps": 0,
    "evaluation.rerank_top_k": 0,
}
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile


@pytest.fixture(scope="module")
def environment(one_device_environment):
    """The environment of a run in its own process, with `devices` virtual devices."""

    def of(devices):
        virtual = f"--xla_force_host_platform_device_count={devices}"
        flags = [one_device_environment["XLA_FLAGS"], QUICK, virtual]
        return one_device_environment | {"XLA_FLAGS": " ".join(flags)}

    return of


def went(workdir, environment, fault=""):
    done = ran(command(workdir, **CHANGES), environment | {"FAULT": fault or "none:0:0"})
    assert done.returncode == (-signal.SIGKILL if fault else 0), done.stderr[-3000:]
    return done.stdout


def both(workdir, environment, own=(), fault="none:0:0", **changes):
    """Two processes of one run; the second also gets the flags `own`."""
    first = command(workdir, **CHANGES | changes)
    told = {"FAULT": fault, "TF_CPP_MIN_LOG_LEVEL": "1"}
    return together([first, [*first, *own]], environment | told)


def ends(processes, limit_s=120):
    """The exit codes and the output of each process."""
    said = [process.communicate(timeout=limit_s)[0] for process in processes]
    return [process.returncode for process in processes], said


def losses(workdir):
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    return np.array([[row["step"], row["loss"], row["gradient_norm"]] for row in rows])


def wait_for_rows(workdir, count, limit_s=240):
    until = time.monotonic() + limit_s
    path = workdir / "metrics.jsonl"
    while not path.exists() or len(read_rows(path)) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """Eight devices of one process."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    said = went(workdir, environment(8))
    return SimpleNamespace(workdir=workdir, said=said)


@pytest.fixture(scope="module")
def of_two(environment, tmp_path_factory):
    """The same eight devices, four in each of two processes that launch/local.py started."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    starter = [sys.executable, "launch/local.py", "--processes=2", "--devices=4", "--"]
    done = ran([*starter, *command(workdir, **CHANGES)], environment(4))
    assert done.returncode == 0, done.stdout[-3000:]
    return SimpleNamespace(workdir=workdir, said=done.stdout)


def test_two_processes_learn_what_one_learns_on_the_same_mesh(undisturbed, of_two):
    host = socket.gethostname()
    for own in "01":
        line = f"[{own}] process {own} of 2 on {host}: 4 of 8 devices (cpu), coordinator 127.0.0.1:"
        assert line in of_two.said
    assert " 8 devices (cpu), 2 processes" in of_two.said
    assert losses(of_two.workdir).shape == (STEPS, 3)
    np.testing.assert_allclose(losses(of_two.workdir), losses(undisturbed.workdir), rtol=1e-4)


def test_two_processes_find_what_one_finds_in_a_gallery(of_two, environment):
    asked = {"evaluation.images": 60, "evaluation.rerank_top_k": 4}
    words = [*command(of_two.workdir, **CHANGES | asked), "--mode=eval"]
    alone = ran(words, environment(8))
    assert alone.returncode == 0, alone.stderr[-3000:]
    expected = json.loads((of_two.workdir / "eval.json").read_text())
    (of_two.workdir / "eval.json").unlink()
    codes, said = ends(together([words] * 2, environment(4)), limit_s=600)
    assert codes == [0, 0], said
    assert json.loads((of_two.workdir / "eval.json").read_text()) == expected
    assert expected["student/reranked"]["images"] == 60
    assert not (of_two.workdir / "cache").exists()


def test_a_run_goes_on_with_fewer_and_more_devices_as_if_nothing_had_happened(
    undisturbed, of_two, environment, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(of_two.workdir, workdir)
    for step in (6, 8, 10, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "best.json").unlink()
    for devices, fault in ((4, "kill:*:7"), (2, "kill:*:10"), (8, "")):
        said = went(workdir, environment(devices), fault)
        assert "resuming at step " in said and f"{devices} devices (cpu), 1 process;" in said
    series, whole = losses(workdir), losses(undisturbed.workdir)
    np.testing.assert_array_equal(series[:, 0], whole[:, 0])
    np.testing.assert_allclose(series, whole, rtol=1e-4)


def test_a_signal_to_one_process_has_both_save_the_same_step_and_a_killed_one_ends_the_other(
    of_two, environment, tmp_path
):
    workdir = tmp_path / "run"
    processes = both(workdir, environment(4), fault="slow:*:1", **{"data.workers": 2})
    wait_for_rows(workdir, 3)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ends(processes)
    assert codes == [0, 0], said
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"saved step {step} on a signal to another process" in said[0] and 3 <= step < STEPS
    # The second start goes on, and loses a process.
    processes = both(workdir, environment(4), fault="slow:*:1")
    wait_for_rows(workdir, step + 2)
    began = time.monotonic()
    processes[1].kill()
    codes, said = ends(processes)
    assert codes == [1, -signal.SIGKILL], said
    assert time.monotonic() - began < 20
    host = socket.gethostname()
    assert f"process 0 on {host} ends: process 1 on {host} is lost" in said[0]
    series = losses(workdir)
    np.testing.assert_allclose(series[:STEPS], losses(of_two.workdir)[: len(series)], rtol=1e-4)


def test_another_config_or_workdir_on_one_host_is_refused_by_name_before_anything_is_written(
    environment, tmp_path
):
    workdir, other = tmp_path / "run", tmp_path / "other"
    own = ["--config.seed=7"]
    codes, said = ends(both(workdir, environment(1), own=own))
    host = socket.gethostname()
    assert codes == [2, 2], said
    sentence = f"error: process 1 on {host} differs in config.seed=7, on process 0 0: "
    assert all(sentence in text for text in said)
    assert not workdir.exists()
    codes, said = ends(both(workdir, environment(1), own=[f"--workdir={other}"]))
    assert codes == [2, 2], said
    assert "is not one folder for all processes: process 1 on" in said[0]
    assert not other.exists() and os.listdir(workdir) == []


def test_a_workdir_in_use_ends_all_processes_with_the_sentence_of_the_first(environment, tmp_path):
    with owned(tmp_path):
        codes, said = ends(both(tmp_path, environment(1)))
    assert codes == [2, 2], said
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert all(f"--workdir={tmp_path} is in use by {owner}" in text for text in said)
    assert list(tmp_path.iterdir()) == []
