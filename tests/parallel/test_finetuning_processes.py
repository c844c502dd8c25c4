"""Two real processes over gloo fine-tune as one process does on the same mesh."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
from small_finetune import main_flags, rows_of, saved
from small_run import command, ran, together

STEPS = 4
WRITTEN = {  # what --mode=eval writes
    "vqa": "vqa_result.json",
    "nlvr2": "nlvr2_predictions.csv",
    "entailment": "predictions.jsonl",
    "labels": "predictions.jsonl",
    "grounding": "eval.json",
    "retrieval": "eval.json",
}


def with_devices(environment, devices):
    virtual = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{environment['XLA_FLAGS']} {virtual}"
    return environment | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "1"}


@pytest.mark.slow
def test_two_processes_tell_labels_by_prompts_as_one(pretrained, one_device_environment, tmp_path):
    figures = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        shutil.copytree(pretrained.parent, workdir)
        data = {"data.test": "scenes:labels", "evaluation.images": 40}
        flags = [*command(workdir, **data), "--mode=eval"]
        environment = with_devices(one_device_environment, 4 // processes)
        started = together([flags] * processes, environment)
        said = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, said
        figures.append(json.loads((workdir / "eval.json").read_text())["zero_shot"])
    assert figures[0] == figures[1] and figures[0]["examples"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("task", WRITTEN)
def test_two_processes_fine_tune_evaluate_and_answer_as_one(
    task, pretrained, one_device_environment, tmp_path
):
    changes = {
        "init": f"model:{pretrained}",
        "train.steps": STEPS,
        "data.global_batch": 8,
        "data.flip": True,
        "data.scenes_examples": 400,
    }

    def started(workdir, *more):
        flags = main_flags(task, **changes)
        return [sys.executable, "-m", "codebook_jax.main", *flags, f"--workdir={workdir}", *more]

    environment = functools.partial(with_devices, one_device_environment)
    one, two = tmp_path / "one", tmp_path / "two"
    done = ran(started(one), environment(4))
    assert done.returncode == 0, done.stderr[-3000:]
    processes = together([started(two)] * 2, environment(2))
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    series = [
        [[row["loss"], row["gradient_norm"]] for row in rows_of(workdir) if "loss" in row]
        for workdir in (one, two)
    ]
    assert np.shape(series[0]) == (STEPS, 2)
    np.testing.assert_allclose(series[1], series[0], rtol=1e-4)
    metric = "eval/txt_r1" if task == "retrieval" else "eval/accuracy"
    scores = [
        {row["step"]: row[metric] for row in rows_of(workdir) if metric in row}
        for workdir in (one, two)
    ]
    assert scores[0] == scores[1] and set(scores[0]) == {0, STEPS}
    ours = saved(two, STEPS)
    for name, array in saved(one, STEPS).items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    processes = together([started(two, "--mode=eval")] * 2, environment(2))
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    done = ran(started(one, "--mode=eval"), environment(4))
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [(workdir / WRITTEN[task]).read_text() for workdir in (one, two)]
    if WRITTEN[task] == "predictions.jsonl":  # with probabilities
        answers = [[json.loads(line) for line in text.splitlines()] for text in answers]
        answers = [[(row["id"], row["label"]) for row in rows] for rows in answers]
    assert answers[0] == answers[1]
