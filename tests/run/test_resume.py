"""End to end with a small real model: a run that was stopped and continued leaves what an
uninterrupted one leaves.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from one_weight import rows_of
from small_run import ROOT, STEPS, command, config_of, ran
from weight_file import assert_same

from codebook_jax import build, train
from codebook_jax.errors import UserError
from codebook_jax.run.metrics import read_rows
from codebook_jax.tools import evaluate

pytestmark = pytest.mark.usefixtures("one_device")


def went_on(workdir, environment, **changes):
    """The output of the command that continues a run to its end, in its own process.

    With other devices it may sum the same numbers in another order.
    """
    done = ran(command(workdir, **changes), environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def started(workdir, environment, workers):
    """A run whose worker processes are in a session with it."""
    words = command(workdir, **{"data.workers": workers})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, cwd=ROOT, start_new_session=True, **pipes)


def states_of(workdir, step=STEPS):
    """Every array of a checkpoint by its path, read without the model."""
    import orbax.checkpoint as ocp

    arrays = {}
    for item in ("student", "teacher", "moments", "queue", "rest"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_run(workdir, other):
    assert rows_of(workdir) == rows_of(other)
    left = states_of(workdir)
    assert_same(left, states_of(other))
    assert len(left) > 50


def copy_of(straight, workdir, *, newest):
    """A copy of the straight run as of step `newest`, with the later rows and scores still in
    it.
    """
    shutil.copytree(straight.workdir, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > newest:
            shutil.rmtree(folder)
    return workdir


def test_a_straight_run_says_what_it_does_and_learns(straight):
    assert "built-in synthetic scenes, not real images" in straight.said
    assert "8 pairs = 1 data shard x 8 (accumulation 1)" in straight.said
    assert "8 of 1,000 images" in straight.said and str(straight.workdir) in straight.said
    assert straight.said.index("validation at step 10") < straight.said.index("--mode=export")
    assert "step 20/20" in straight.progress
    rows = [row for row in rows_of(straight.workdir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[-1]["loss"] < rows[0]["loss"]
    evaluations = [row for row in rows_of(straight.workdir) if "eval/txt_r1" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    assert ["eval/reranked_txt_r1" in row for row in evaluations] == [False, True]
    record = json.loads((straight.workdir / "config.json").read_text())
    assert record["config"]["itm"]["groups"] == 1 and record["data"]["examples"] == 64


def test_a_run_keeps_others_out_until_it_is_killed_and_resumed_it_is_the_straight_run(
    straight, one_device_environment, tmp_path, capsys
):
    workdir = tmp_path / "run"
    first = started(workdir, one_device_environment | {"FAULT": "stop:*:11"}, workers=1)
    stopped = os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert stopped.si_status == signal.SIGSTOP
    second = ran(command(workdir), one_device_environment)
    assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
    assert f"--workdir={workdir} is in use by process {first.pid}" in second.stderr
    evaluate.evaluate(config_of(), workdir)  # of few images, which is said
    assert "8 of 1,000 images" in capsys.readouterr().out
    results = json.loads((workdir / "eval.json").read_text())["student/dual"]
    assert (results["images"], results["images_listed"]) == (8, 1000)
    first.kill()  # alone: its worker ends by itself
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "loss": 3.')
    said = went_on(workdir, one_device_environment, **{"data.workers": 2})
    assert "resuming at step " in said and "data.workers=1, now 2" in said
    assert "watching" not in said  # nothing is waited for
    assert_same_run(workdir, straight.workdir)
    first.wait()
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)


def test_sigterm_to_every_process_saves_and_the_resumed_run_is_the_straight_run(
    straight, one_device_environment, tmp_path
):
    workdir = tmp_path / "run"
    process = started(workdir, one_device_environment | {"FAULT": "slow:*:7"}, workers=2)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if (workdir / "metrics.jsonl").exists() and len(read_rows(workdir / "metrics.jsonl")) >= 7:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.endswith(" on SIGTERM")]
    step = int(line.removeprefix("saved step ").removesuffix(" on SIGTERM"))
    assert 7 <= step < STEPS and (workdir / "checkpoints" / str(step)).is_dir()
    assert f"resuming at step {step} " in went_on(workdir, one_device_environment)
    assert_same_run(workdir, straight.workdir)


def test_a_changed_config_is_refused_by_name_before_anything_is_touched(straight):
    before = sorted((path, path.stat().st_mtime_ns) for path in straight.workdir.rglob("*"))
    changes = {"data.global_batch": 4, "seed": 1, "data.scenes_examples": 65}
    with pytest.raises(UserError) as refusal:
        train.fit(config_of(**changes), straight.workdir)
    for words in ("data.global_batch=8, now 4", "seed=0, now 1", "=64, now 65"):
        assert words in str(refusal.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in straight.workdir.rglob("*")) == before


def test_a_longer_run_goes_on_from_the_last_step_and_the_change_is_recorded(
    straight, tmp_path, capsys
):
    workdir = copy_of(straight, tmp_path / "run", newest=20)
    train.fit(config_of(**{"train.steps": 22}), workdir)
    said = capsys.readouterr().out
    assert "train.steps=20, now 22: changes what is learned" in said
    assert "resuming at step 20 (" in said
    rows = rows_of(workdir)
    assert rows[: len(rows_of(straight.workdir))] == rows_of(straight.workdir)
    assert rows[-2]["step"] == rows[-1]["step"] == 22
    record = json.loads((workdir / "config.json").read_text())
    assert record["changes"] == [{"step": 20, "fields": {"train.steps": [20, 22]}}]


def test_the_best_checkpoint_is_evaluated_on_the_test_data(straight, capsys):
    evaluate.evaluate(None, straight.workdir)
    said = capsys.readouterr().out
    best = json.loads((straight.workdir / "best.json").read_text())["step"]
    assert f"the checkpoint of step {best} (the best in validation)" in said
    results = json.loads((straight.workdir / "eval.json").read_text())
    assert results.keys() == {"student/dual", "teacher/dual", "student/reranked"}
    names = {"chance_r1", *(f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10))}
    for values in results.values():
        assert names <= values.keys() and values["images"] == values["images_listed"] == 1000


def test_a_config_given_to_evaluate_a_run_keeps_the_runs_own_data_unless_a_flag_names_others(
    straight, one_device_environment, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(straight.workdir, workdir)
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["data"]["eval"] = f"json:{tmp_path / 'own.json'}"
    (workdir / "config.json").write_text(json.dumps(record))
    used = build.build_trained(config_of(), workdir, {"data.eval"}).config
    assert used.data.eval == "scenes"
    done = ran([*command(workdir), "--mode=eval"], one_device_environment)
    assert done.returncode == 2
    assert f"config.data.eval=json:{tmp_path / 'own.json'}" in done.stdout
    assert "own.json cannot be read" in done.stderr
