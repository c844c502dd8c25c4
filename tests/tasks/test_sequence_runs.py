"""A run on stories: killed, resumed bit for bit, evaluated, reported, exported, loaded."""

import json
import sys

import numpy as np
import pytest
from small_run import ROOT, SMALL, kill_after, ran

import codebook_jax
from codebook_jax.run.checkpoint import read_arrays

STEPS = 30
FIELDS = {
    name: value
    for name, value in SMALL.items()
    if not name.startswith("queue.") and name != "model.text.fusion_depth"
} | {
    "data.scenes_examples": 32,
    "data.global_batch": 4,
    "sequences.iterations": 20,
    "train.steps": STEPS,
    "evaluation.images": 12,
    "evaluation.rerank_top_k": 0,
}


def command(workdir, *more):
    return [
        sys.executable,
        "-m",
        "codebook_jax.main",
        f"--config={ROOT / 'configs' / 'sequences.py'}:tiny",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in FIELDS.items()),
        *more,
    ]


def run(environment, workdir, *more):
    done = ran(command(workdir, *more), environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_on_stories_does_all_that_the_program_does(one_device_environment, tmp_path):
    environment = one_device_environment
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    said = run(environment, straight)
    assert "a batch of 4 stories" in said and "12 of 400 stories of scenes:stories" in said
    kill_after(command(killed), environment, killed, step=14)
    assert "resuming at step" in run(environment, killed)
    for item in ("student", "teacher", "moments", "rest"):
        one, other = (
            read_arrays(folder / "checkpoints" / str(STEPS) / item) for folder in (straight, killed)
        )
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    names = {name for item in ("student", "teacher") for name in read_arrays(
        straight / "checkpoints" / str(STEPS) / item
    )}  # fmt: skip
    assert not [name for name in names if "fusion" in name or "matching" in name]

    assert "right order rather than a shuffled one" in run(environment, straight, "--mode=eval")
    results = json.loads((straight / "eval.json").read_text())
    assert results["student/ordered"]["stories"] == 12
    assert results["student/mean"]["right_order"] == results["student/bag"]["right_order"] == 50
    assert "report:" in run(environment, straight, "--mode=report")
    run(environment, straight, "--mode=export", "--config.export.teacher=true")
    model = codebook_jax.load(straight / "export", teacher=True)
    found = model.encode_text(["a red circle left of a blue square"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_task_refuses_the_data_of_the_other_in_one_sentence(one_device_environment, tmp_path):
    for config, data, cure in (
        ("sequences.py", "scenes", "scenes:stories"),
        ("base.py", "scenes:stories", "configs/sequences.py"),
    ):
        done = ran(
            [
                sys.executable,
                "-m",
                "codebook_jax.main",
                f"--config={ROOT / 'configs' / config}:tiny",
                f"--workdir={tmp_path / config}",
                f"--config.data.train={data}",
            ],
            one_device_environment,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert cure in done.stderr and len(done.stderr.strip().splitlines()) == 1
