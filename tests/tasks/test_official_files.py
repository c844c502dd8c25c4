"""The files of each task as they are published: packed, learned from, evaluated, and answered in a
submission.
"""

import json
import sys

import pytest
from example_files import lines, write_all, write_karpathy
from list_files import write
from small_finetune import config_of, evaluated, losses, main_flags, trained
from small_packing import pack
from small_run import ran

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device_for_all")]

FEW = {
    "train.steps": 2,
    "data.global_batch": 2,
    "evaluation.batch": 2,
    "evaluation.between": (),
    "evaluation.images": 0,
    "checkpoint.every_steps": 2,
}


@pytest.fixture
def files(tmp_path):
    """(the folder, {kind: sources})"""
    folder = tmp_path / "files"
    return folder, write_all(folder)


def packed(spec, folder):
    assert pack("", folder, source=spec, side_px=0) == 0
    return f"records:{folder}"


def learned(task, train, pretrained, workdir, **changes):
    """The config of a run of two steps."""
    config = config_of(
        task,
        **FEW | {"init": f"model:{pretrained}", "data.train": train, "data.eval": train} | changes,
    )
    trained(config, workdir)
    assert len(losses(workdir)) == 2
    return config


def result_of(config, workdir, spec):
    """(results, what is said) of an evaluation on other data, with the run's own recipe."""
    config = config.copy_and_resolve_references().unlock()
    config.data.test = spec
    return evaluated(workdir, config.lock())


def command(*arguments):
    return [sys.executable, "-m", "codebook_jax.main", *arguments]


def test_questions_of_three_files_are_learned_and_all_of_a_test_set_are_answered(
    files, pretrained, one_device_environment, tmp_path
):
    folder, specs = files
    sources = ",".join([*specs["questions"], packed(specs["questions"][0], tmp_path / "packed")])
    workdir = tmp_path / "run"
    changes = FEW | {
        "init": f"model:{pretrained}", "data.train": sources, "data.eval": specs["questions"][0]
    }  # fmt: skip
    flags = [*main_flags("vqa", **changes), f"--workdir={workdir}"]
    done = ran(command(*flags), one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 answers to choose from, 100.0% of those in training" in done.stdout
    assert json.loads((workdir / "config.json").read_text())["config"]["vqa"]["candidates"]

    test = f"vqa:{folder}/questions.json"  # without the annotations, as test2015
    use = ["--mode=eval", f"--config.data.test={test}"]
    done = ran(command(*flags, *use), one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 questions without known answers" in done.stdout
    rows = json.loads((workdir / "vqa_result.json").read_text())
    assert [row["question_id"] for row in rows] == [420000, 420001, 730000]
    assert {row["answer"] for row in rows} <= {"red", "dark red", "2", "on a table"}


def test_comparisons_are_answered_by_identifier_unless_a_picture_is_lost(
    files, pretrained, tmp_path
):
    folder, specs = files
    official, albefs = specs["comparisons"]
    workdir = tmp_path / "run"
    train = f"{packed(official, tmp_path / 'packed')},{albefs}"
    config = learned("nlvr2", train, pretrained, workdir, **{"data.eval": official})
    results, said = result_of(config, workdir, official)
    assert results["student"]["examples"] == 3 and results["student"]["sentences"] == 2
    written = (workdir / "nlvr2_predictions.csv").read_text().splitlines()
    keys = ["train-10-0-0", "train-10-1-1", "train-10-1-0"]
    assert [line.partition(",")[0] for line in written] == keys
    assert {line.partition(",")[2] for line in written} <= {"True", "False"}
    (workdir / "nlvr2_predictions.csv").unlink()
    write(folder / "images/train/53/train-10-0-img1.png", b"no picture")
    results, said = result_of(config, workdir, official)
    assert results["student"]["examples"] == 2
    assert "nlvr2_predictions.csv is not written, since it must answer every example" in said
    assert not (workdir / "nlvr2_predictions.csv").exists()


def test_statements_of_both_forms_are_learned_and_told(files, pretrained, tmp_path):
    folder, specs = files
    train = f"{packed(specs['statements'][0], tmp_path / 'packed')},{specs['statements'][1]}"
    config = learned("entailment", train, pretrained, tmp_path / "run")
    results, _ = result_of(config, tmp_path / "run", specs["statements"][0])
    assert results["student"]["examples"] == 2  # the one without a gold label is left out
    rows = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len({json.loads(row)["id"] for row in rows}) == 2
    unknown = [{"Flickr30K_ID": "45", "pairID": "x", "sentence2": "A dog."}]
    write(folder / "test.jsonl", lines(unknown))
    _, said = result_of(config, tmp_path / "run", f"entailment:{folder}/test.jsonl")
    assert "1 statements without known answers" in said


def test_expressions_are_learned_without_and_found_among_boxes(files, pretrained, tmp_path):
    _, specs = files
    [spec] = specs["expressions"]
    train = packed(spec, tmp_path / "packed")
    few = {"queue.size": 4, "data.eval": spec}
    config = learned("grounding", train, pretrained, tmp_path / "run", **few)
    results, said = result_of(config, tmp_path / "run", spec)
    assert results["grounding"]["expressions"] >= 2 and "grounding of" in said


def test_pairs_of_karpathys_splits_are_learned_and_retrieved(pretrained, tmp_path):
    spec = write_karpathy(tmp_path / "coco")
    train = packed(spec, tmp_path / "packed")
    few = {"queue.size": 4, "data.eval": spec}
    config = learned("retrieval", train, pretrained, tmp_path / "run", **few)
    results, _ = result_of(config, tmp_path / "run", spec)
    dual = results["student/dual"]
    assert (dual["images"], dual["texts"]) == (2, 4)  # those of the test split
    assert results["student/reranked"]["rerank_top_k"] >= 2
