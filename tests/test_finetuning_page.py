"""The commands of the page on fine-tuning start, on the files that the page shows."""

import json
import shutil

import pytest
from list_files import write
from small_packing import jpeg
from small_run import ROOT, SMALL, config_of
from test_docs import blocks, commands, parsed

from codebook_jax import build
from codebook_jax.config import flat, with_fields
from codebook_jax.tools import evaluate, export

PAGE = ROOT / "docs" / "finetuning.md"
OWN = ("questions.json", "sentences.json", "pairs.json", "captions.jsonl", "expressions.json")


@pytest.fixture
def folder(straight, tmp_path, monkeypatch, one_device):
    """The page's files, and a small model's export where the page has that of the demo."""
    shutil.copytree(straight.workdir, tmp_path / "runs" / "demo")
    export.export(config_of(), tmp_path / "runs" / "demo")
    for name, content in zip((*OWN, "boxes.json"), blocks("json", PAGE), strict=True):
        write(tmp_path / "own" / name, content)
        if name != "captions.jsonl":
            json.loads(content)
    for number, name in enumerate(("harbour", "market")):
        write(tmp_path / "own" / "photos" / f"{name}.jpg", jpeg(number))
        write(tmp_path / "own" / "labels" / name / f"{number + 1}.jpg", jpeg(number))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_on_own_data_starts_from_the_export(folder):
    started = {}
    for arguments in commands(PAGE):
        values = parsed(arguments[2:], {})
        if "--config.init=model:runs/demo/export" not in arguments:
            continue
        small = {n: v for n, v in SMALL.items() if n in flat(values.config.to_dict())}
        config = with_fields(values.config, small | {"data.global_batch": 2})
        build.check(config)
        parts = build.build_training(config, folder / values.workdir, steps_saved=[], learns=False)
        with build.batches(parts, start_step=0) as stream:
            batch = next(stream)
        assert batch.skipped.sum() == 0 and len(batch.tokens) == 2
        assert parts.start.arrays
        started[values.workdir] = parts.config.task
    assert started == {
        "runs/vqa": "vqa",
        "runs/own_vqa": "vqa",
        "runs/own_entailment": "entailment",
        "runs/own_nlvr2": "nlvr2",
        "runs/assignment": "text_assignment",
        "runs/own_retrieval": "retrieval",
        "runs/own_grounding": "grounding",
        "runs/own_labels": "labels",
    }


def test_a_run_of_pre_training_tells_labels_by_prompts_as_the_page_says(folder):
    (arguments,) = (each for each in commands(PAGE) if "--workdir=runs/demo" in each)
    values = parsed(arguments[2:], {})
    config = config_of(**{"data.test": values.config.data.test})
    assert values.mode == "eval"
    evaluate.evaluate(config, folder / "runs" / "demo", {"data.test"})
    results = json.loads((folder / "runs" / "demo" / "eval.json").read_text())
    assert results["zero_shot"]["examples"] == 2 and results["zero_shot"]["chance_uniform"] == 50
