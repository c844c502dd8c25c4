"""A run of configs/clip.py, whose state has no teacher and no queue: resumed, evaluated, used."""

import json
import shutil

import numpy as np
import pytest
from one_weight import rows_of
from small_run import command, config_of, ran
from weight_file import assert_same

import codebook_jax
from codebook_jax import build
from codebook_jax.errors import UserError
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.tools import evaluate, export
from configs import clip

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

LATE = {"model.text.depth": 2, "model.text.fusion_depth": 0, "codebook.size": 0, "queue.size": 0}
LATE |= {"model.image.stem": "conv", "model.pool": "mean", "optimizer.name": "muon"}
LATE |= {"evaluation.rerank_top_k": 0, "train.steps": 6, "checkpoint.every_steps": 3}
PICTURE = np.zeros((40, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def late(one_device_environment, tmp_path_factory):
    """The workdir of six uninterrupted steps."""
    workdir = tmp_path_factory.mktemp("late") / "run"
    done = ran(command(workdir, "clip", **LATE), one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def saved(workdir):
    """Every array of the checkpoint of step 6, by its path."""
    folder = workdir / "checkpoints" / "6"
    items = [path.name for path in folder.iterdir() if path.is_dir() and path.name != "meta"]
    assert sorted(items) == ["moments", "rest", "student"]
    return {f"{item}/{name}": x for item in items for name, x in read_arrays(folder / item).items()}


def test_a_resumed_run_is_the_straight_one(late, one_device_environment, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(late, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    done = ran(command(workdir, "clip", **LATE), one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(saved(workdir), saved(late))
    assert rows_of(workdir) == rows_of(late)
    assert not [name for name in saved(late) if "fusion" in name or "masked_words" in name]


def test_it_is_evaluated_by_its_student_alone_and_never_re_ranked(late):
    config = config_of(clip, **LATE | {"evaluation.rerank_top_k": 3})
    evaluate.evaluate(config, late)
    results = json.loads((late / "eval.json").read_text())
    assert results.keys() == {"student/dual"} and results["student/dual"]["rerank_top_k"] == 0


def test_its_export_encodes_as_the_checkpoint_and_says_what_it_has_not(late):
    export.export(config_of(clip, **LATE), late)
    assert json.loads((late / "export" / "export.json").read_text())["format"] == 2  # means
    model = codebook_jax.load(late)
    parts = build.build_trained(None, late)
    towers = build.restore_trained(parts, late, ("student",)).state.student["towers"]
    tokens, lengths, _ = parts.tokenizer.encode(["a red circle"], 24)
    expected = parts.task.model.encode_texts(towers, tokens, lengths)[0]
    np.testing.assert_allclose(model.encode_text("a red circle"), expected, atol=1e-5)
    assert model.encode_image(PICTURE).shape == (1, model.dim) and model.codewords.shape[0] == 0
    with pytest.raises(UserError, match="has no fusion encoder to match with"):
        model.match(PICTURE, "a red circle")
    with pytest.raises(UserError, match="has no codebook"):
        model.codes(images=PICTURE)


@pytest.mark.parametrize(
    "form, teacher, lacks",
    [("codis", True, "no teacher$"), ("albef", False, "no teacher, no fusion encoder, no queue$")],
)
def test_an_export_of_what_it_has_not_is_refused(late, form, teacher, lacks):
    fields = {"export.format": form, "export.teacher": teacher}
    with pytest.raises(UserError, match=lacks):
        export.export(config_of(clip, **LATE | fields), late)
