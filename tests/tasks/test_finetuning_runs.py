"""Every fine-tuning task from a pre-trained export to a model that is used: trained, validated,
resumed, evaluated, exported, loaded.
"""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small_finetune import (
    STEPS,
    TASKS,
    config_of,
    evaluated,
    exported,
    losses,
    picture,
    rows_of,
    saved,
    saying,
    trained,
)
from weight_file import assert_same

import codebook_jax
from codebook_jax import build
from codebook_jax.data.sources import open_source
from codebook_jax.files import write_json
from codebook_jax.models.finetuned import LABELS
from codebook_jax.report.run import write_report
from codebook_jax.run.checkpoint import read_arrays

QUICK = ("entailment", "labels")
EVERY_LABEL = {"labels": {"data.scenes_examples": 400}}  # else some are seen in tests alone
PICTURES = [picture(0), picture(1)]
TEXTS = ["a red circle", "a small blue square"]

pytestmark = pytest.mark.usefixtures("one_device_for_all")


@pytest.fixture(
    scope="module",
    params=[
        task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in TASKS
    ],
)
def run(request, pretrained, one_device_for_all, tmp_path_factory):
    """A run of each task, evaluated and exported."""
    task, workdir = request.param, tmp_path_factory.mktemp(request.param) / "run"
    config = config_of(task, init=f"model:{pretrained}", **EVERY_LABEL.get(task, {}))
    done = trained(config, workdir)
    results, table = evaluated(workdir)
    between = config.copy_and_resolve_references().unlock()
    between.export.between = 0.5
    mean = exported(workdir, between.lock())
    whole = exported(workdir)
    return SimpleNamespace(
        task=task,
        config=config,
        workdir=workdir,
        said=done.said,
        results=results,
        table=table,
        mean=mean,
        whole=whole,
    )


def test_it_learns_is_scored_before_its_first_step_and_tries_weights_on_the_way(run):
    rows = rows_of(run.workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert np.isfinite(losses(run.workdir)).all()
    scored = {row["step"]: row for row in rows if "time/evaluation_s" in row}
    assert set(scored) == {0, STEPS} and any(name.startswith("eval/") for name in scored[0])
    scores = json.loads((run.workdir / "best.json").read_text())["scores"]
    assert set(scores) == {"0", str(STEPS)}
    assert "before the first step" in run.said
    [tried] = [row for row in rows if "between/share" in row]
    assert tried["between/share"] == 0.5 and np.isfinite(tried["between/score"])
    points = f"0: {scores['0']:.2f}, 0.5: {tried['between/score']:.2f}, 1: {scores[str(STEPS)]:.2f}"
    assert points in run.said


def test_it_stops_and_goes_on_bit_for_bit(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    assert "resuming at step 2 " in trained(run.config, workdir).said
    items = [path.name for path in (run.workdir / "checkpoints" / str(STEPS)).iterdir()]
    items = [name for name in items if name in ("student", "teacher", "moments", "rest", "queue")]
    assert {"student", "moments"} <= set(items)
    for item in items:
        assert_same(saved(workdir, STEPS, item), saved(run.workdir, STEPS, item))


def test_half_way_between_start_and_end_is_the_mean_of_both(run, pretrained):
    assert_same(run.whole, saved(run.workdir, STEPS))
    assert run.whole.keys() == run.mean.keys()
    before, source_of = read_arrays(pretrained / "student"), build.TASKS[run.task].pretrained
    known = {name: source_of(f"student/{name}") for name in run.whole}
    known = {name: source.removeprefix("student/") for name, source in known.items() if source}
    assert "towers/image/patches/kernel" in known
    for name, source in known.items():
        mean = (before[source] + run.whole[name]) / 2
        np.testing.assert_allclose(run.mean[name], mean, atol=1e-6, err_msg=name)
    moved = max(np.abs(run.whole[name] - before[known[name]]).max() for name in known)
    assert moved == 0 if run.task == "labels" else moved > 1e-4  # a probe leaves the towers


def test_its_predictions_cover_the_test_set(run):
    assert "the checkpoint of step" in run.table
    known = open_source(TASKS[run.task][1], role="test", size_px=32, scenes_examples=1, seed=0)
    known = [known[at].key for at in range(len(known))] if known.kind != "pairs" else range(1000)
    if run.task in ("retrieval", "grounding"):
        protocols = {"grounding": {"grounding"}, "retrieval": {"student/dual", "student/reranked"}}
        assert protocols[run.task] <= run.results.keys()
        return
    figures = run.results["student"]
    assert 0 <= figures["accuracy"] <= 100
    if run.task == "vqa":
        rows = json.loads((run.workdir / "vqa_result.json").read_text())
        assert [row["question_id"] for row in rows] == list(known)
        assert all(isinstance(row["answer"], str) and row["answer"] for row in rows)
        assert figures["questions"] == len(rows)
    elif run.task == "nlvr2":
        with (run.workdir / "nlvr2_predictions.csv").open() as file:
            rows = list(csv.reader(file))
        assert [key for key, _ in rows] == list(map(str, known))
        assert {answer for _, answer in rows} <= {"True", "False"} and "consistency" in figures
    else:
        lines = (run.workdir / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({row["id"] for row in rows}) == len(rows) == 1000
        assert all(0 < row["probability"] <= 1 for row in rows)
        labels = {row["label"] for row in rows}
        assert run.task == "labels" or labels <= set(LABELS[run.task])


def test_predictions_of_a_part_of_the_data_are_said_to_be_no_whole_submission(run, tmp_path):
    assert "evaluated: for a submission" not in run.table
    if run.task in ("retrieval", "grounding"):
        return
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    changes = {"data.scenes_examples": run.config.data.scenes_examples, "evaluation.images": 5}
    _, said = evaluated(workdir, config_of(run.task, init=run.config.init, **changes))
    assert "only the first 5 of 1,000" in said and "5 of its source" not in said


def test_a_mixture_is_of_the_last_weights_whichever_checkpoint_is_the_best(run, tmp_path):
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    scores = {"0": 1.0, "2": 3.0, str(STEPS): 2.0}
    write_json(workdir / "best.json", {"step": 2, "score": 3.0, "metric": "", "scores": scores})
    assert_same(exported(workdir), saved(workdir, 2))
    config = run.config.copy_and_resolve_references().unlock()
    config.export.between = 0.5
    assert_same(exported(workdir, config.lock()), run.mean)


def test_its_report_shows_its_curves(run):
    with saying() as said:
        write_report(None, run.workdir)
    assert "report:" in said.getvalue() and "no checkpoint" not in said.getvalue()
    page = (run.workdir / "report.html").read_text()
    assert "eval/" in page and "no checkpoint yet" not in page


def test_its_export_has_the_verb_of_its_task(run):
    if run.task == "text_assignment":
        with pytest.raises(codebook_jax.UserError, match="the stage before NLVR2"):
            codebook_jax.load(run.workdir)
        return
    model = codebook_jax.load(run.workdir)
    if run.task == "entailment":
        found = model.entails(PICTURES, TEXTS)
        assert found.labels == LABELS["entailment"] and len(found.best) == 2
        probabilities = found.probabilities
    elif run.task == "labels":
        found = model.classify(PICTURES)
        assert found.probabilities.shape == (2, len(found.labels)) and len(found.labels) == 80
        probabilities = found.probabilities
    elif run.task == "nlvr2":
        true = model.compare(PICTURES, PICTURES[::-1], TEXTS)
        assert true.shape == (2,)
        probabilities = np.stack([true, 1 - true], axis=1)
    elif run.task == "vqa":
        found = model.answer(PICTURES, ["what colour is the circle?"] * 2, top_k=3)
        assert [len(texts) for texts in found.texts] == [3, 3]
        assert (np.diff(found.probabilities) <= 0).all() and found.probabilities.max() <= 1
        assert found.probabilities.shape == (2, 3)
        return
    else:
        features = model.encode_image(PICTURES), model.encode_text(TEXTS)
        np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
        matched = model.match(PICTURES, TEXTS)
        probabilities = np.stack([matched, 1 - matched], axis=1)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities >= 0).all()
