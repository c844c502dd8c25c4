"""A task of one file (probe.py) is trained, resumed, evaluated and exported by the same program."""

import json
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from probe import Probe
from small_run import ROOT, SMALL, kill_after

from codebook_jax import build
from codebook_jax.errors import UserError
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.run.metrics import read_rows
from codebook_jax.tasks.task import Task
from configs import base

STEPS = 40


def command(workdir, *more):
    fields = SMALL | {"task": "probe", "train.steps": STEPS, "optimizer.learning_rate": 0.1}
    return [
        sys.executable,
        str(ROOT / "tests" / "tasks" / "run_probe.py"),
        f"--config={ROOT / 'configs' / 'paper.py'}:tiny",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *more,
    ]


def run(environment, workdir, *more):
    done = subprocess.run(
        command(workdir, *more), env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_task_of_one_file_does_all_that_the_program_does(
    devices, one_device_environment, tmp_path
):
    flags = (
        f"{one_device_environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    )
    environment = one_device_environment | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert f"{devices} device" in run(environment, straight)
    kill_after(command(killed), environment, killed, step=12)
    assert "resuming at step" in run(environment, killed)
    for item in ("head", "rest"):
        one, other = (
            read_arrays(folder / "checkpoints" / str(STEPS) / item) for folder in (straight, killed)
        )
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)

    rows = read_rows(straight / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    scores = {row["step"]: row["eval/named"] for row in rows if "eval/named" in row}
    best = json.loads((straight / "best.json").read_text())
    assert best["score"] == max(scores.values()) == scores[best["step"]]

    assert "images is named" in run(environment, straight, "--mode=eval")
    assert "named" in json.loads((straight / "eval.json").read_text())["probe"]
    run(environment, straight, "--mode=export")
    with ocp.StandardCheckpointer() as checkpointer:
        exported = checkpointer.restore(straight / "export" / "head")
    kept = read_arrays(straight / "checkpoints" / str(best["step"]) / "head")
    np.testing.assert_array_equal(exported["kernel"], kept["kernel"])


@pytest.mark.parametrize("missing", ["checkpoint_items", "fresh", "update", "evaluate"])
def test_a_task_without_a_method_that_it_must_define_is_refused_at_the_start(missing, monkeypatch):
    unfinished = type("Unfinished", (Probe,), {missing: getattr(Task, missing)})
    monkeypatch.setitem(build.TASKS, "other", unfinished)
    config = base.paper("tiny")
    config.task = "other"
    with pytest.raises(UserError, match=f"config.task='other' lacks {missing}: "):
        build.check(config)
