"""A run by the command on real files, some of them bad, killed and restarted."""

import json
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image
from small_run import ROOT, command

from codebook_jax.run.metrics import read_rows

GOOD = 499


def write_pairs(folder):
    """504 pairs, of which 1 % are bad files, one of every kind; and two more without a caption."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(GOOD):
        name = f"{number:03}.{'jpg' if number % 3 else 'png'}"
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
        entries.append({"image": name, "caption": [f"picture {number}", f"number {number}"]})
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 Not Found")
    (folder / "cut.jpg").write_bytes((folder / "001.jpg").read_bytes()[:900])
    (folder / "folder.jpg").mkdir()
    bad = ("missing.jpg", "empty.jpg", "text.jpg", "cut.jpg", "folder.jpg")
    for place, name in zip((3, 100, 101, 102, 500), bad, strict=True):  # three in a row
        entries.insert(place, {"image": name, "caption": f"bad {name}"})
    entries += [{"image": "000.png", "caption": ""}, {"image": "001.jpg", "caption": " "}]
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.slow
def test_a_run_on_files_of_which_some_are_bad_ends_and_counts_each_once_an_epoch(
    one_device_environment, tmp_path
):
    (tmp_path / "pictures").mkdir()
    workdir, source = tmp_path / "run", f"json:{write_pairs(tmp_path / 'pictures')}"
    changes = {
        "data.train": source,
        "data.eval": source,
        "data.max_bad_rate": 0.02,
        "data.tokenizer_vocabulary": 500,
        "train.steps": 63,  # an epoch of 504 at batch 8
        "checkpoint.every_steps": 20,
        "evaluation.every_steps": 0,
    }

    def run(environment, **further):
        return subprocess.run(
            command(workdir, **changes, **further),
            env=one_device_environment | environment,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    assert run({"FAULT": "kill:*:45"}).returncode == -signal.SIGKILL
    done = run({}, **{"data.workers": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "504 of 506 listed pairs (99.6%)" in done.stdout
    assert "an epoch is 63.0 steps, 63 steps are 1 epoch\n" in done.stdout
    assert "unknown tokens: 0 of " in done.stdout and "in 1,003 training captions" in done.stdout
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 64))
    assert rows[-1]["data/skipped"] == 8  # five bad ones, and bad ones that replaced another
    assert all(np.isfinite(row["loss"]) for row in rows)
    evaluated = next(row for row in read_rows(workdir / "metrics.jsonl") if "eval/txt_r1" in row)
    assert evaluated["step"] == 63
