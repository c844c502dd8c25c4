"""A whole model as a run's start: an ALBEF checkpoint, or another run or export, from its file to
its use in a run.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import numpy as np
import pytest
from golden_weights import ALBEF, VOCABULARY, albef_config, one_mesh, refusal, started
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from small_run import together
from weight_file import assert_same

from codebook_jax import build, train
from codebook_jax.config import with_fields
from codebook_jax.errors import UserError
from codebook_jax.parallel import sharding
from codebook_jax.run.checkpoint import read_arrays
from codebook_jax.tasks import pretrain
from codebook_jax.tools import evaluate, export
from codebook_jax.tools.import_weights import import_weights
from codebook_jax.weights import start, write

WORDS = VOCABULARY._replace(size=101)


@pytest.fixture(scope="module")
def albef(tmp_path_factory):
    """The golden ALBEF as a file, and a folder with a tokenizer of as many words."""
    folder = tmp_path_factory.mktemp("albef")
    with np.load(ALBEF) as stored:
        weights = {name[6:]: stored[name] for name in stored.files if name.startswith("state/")}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase]
    words += [f"##{letter}" for letter in ascii_lowercase]
    words += [f"{a}{b}" for a in "aeio" for b in ascii_lowercase[1:12]]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "words" / "config.json").write_text('{"model_type": "bert"}')
    file = written(folder / "albef.safetensors", weights)
    return SimpleNamespace(file=file, tokenizer=folder / "words", weights=weights)


def written(path, weights):
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, path)
    return path


def run_config(albef, **changes):
    fields = {
        "init": f"model:{albef.file}",
        "data.tokenizer": str(albef.tokenizer),
        "data.scenes_examples": 16,
        "data.threads": 1,
        "data.prefetch": 1,
        "evaluation.images": 5,
        "evaluation.batch": 5,
        "evaluation.rerank_top_k": 2,
        "evaluation.every_steps": 0,
        "train.steps": 2,
        "log_every_steps": 1,
    }
    return with_fields(albef_config(), fields | changes)


@pytest.fixture(scope="module")
def imported(albef, one_device_environment, tmp_path_factory):
    """A run made from the golden ALBEF by --mode=import, with its output."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_, **__: one_mesh())
        for module in (train, build):
            patch.setattr(module, "say", said.append)
        import_weights(run_config(albef), workdir)
    return SimpleNamespace(workdir=workdir, said="\n".join(said))


@pytest.fixture
def run(imported, tmp_path, one_device):
    """A copy of the imported run."""
    return Path(shutil.copytree(imported.workdir, tmp_path / "run"))


def test_an_imported_albef_is_a_run_whose_table_was_printed(imported):
    assert "model:" in imported.said and "(ALBEF; without a number of heads" in imported.said
    assert "teacher: loaded; queues: loaded" in imported.said
    lines = imported.said.splitlines()
    (new,) = [line for line in lines if line.startswith("newly initialised")]
    assert new.split()[-1] == "codebook"
    assert [path.name for path in (imported.workdir / "checkpoints").iterdir()] == ["0"]


def test_an_imported_albef_exported_again_is_the_file_bit_for_bit(run, albef):
    export.export(run_config(albef, **{"export.format": "albef"}), run)
    folder = run / "export_albef"
    assert_same(load_file(folder / "model.safetensors"), albef.weights)
    described = json.loads((folder / "config.json").read_text())
    assert described["vision"]["num_attention_heads"] == 3
    assert described["text"]["fusion_layer"] == 2
    config = run_config(albef, init=f"model:{folder}", **{"data.tokenizer": ""})
    assert start.tokenizer_of(config, start.read_start(config)) == str(folder)
    with pytest.raises(UserError, match=r"3 heads, .*config.model.image.heads=6"):
        start.read_start(with_fields(config, {"model.image.heads": 6}))
    with pytest.raises(UserError, match="with model.pool='cls', but config.model.pool='mean'"):
        start.read_start(with_fields(config, {"model.pool": "mean"}))


def test_an_imported_albef_is_evaluated_and_trained_on(run, albef, capsys):
    evaluate.evaluate(None, run)
    results = json.loads((run / "eval.json").read_text())
    assert {"student/dual", "teacher/dual", "student/reranked"} <= results.keys()
    with pytest.raises(UserError, match=rf"--workdir={run} .*step 0"):
        import_weights(run_config(albef), run)
    before = read_arrays(run / "checkpoints" / "0" / "student")
    Path(albef.file).rename(albef.file.with_suffix(".away"))  # continuing a run does not need it
    try:
        train.fit(run_config(albef), run)
    finally:
        albef.file.with_suffix(".away").rename(albef.file)
    after = read_arrays(run / "checkpoints" / "2" / "student")
    assert "resuming at step 0" in capsys.readouterr().out
    moved = after["towers/image/patches/kernel"] - before["towers/image/patches/kernel"]
    assert 0 < np.abs(moved).max() < 0.01


def test_a_run_that_goes_on_needs_its_own_tokenizer_and_its_own_start(run, albef, tmp_path):
    config = run_config(albef, init=f"model:{run}", **{"data.tokenizer": ""})
    other = tmp_path / "other"
    import_weights(config, other)
    shutil.rmtree(other / "tokenizer")
    with pytest.raises(UserError, match="other/tokenizer is missing"):
        build.build_training(config, other, steps_saved=[0])
    assert not (other / "tokenizer").exists()  # no new tokenizer was trained
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match="has no tokenizer beside it"):
        import_weights(config, tmp_path / "third")
    shutil.copytree(albef.tokenizer, other / "tokenizer")
    changed = run_config(albef, **{"data.tokenizer": ""})
    for steps in ([], [0]):  # before the first checkpoint the tokenizer is there already
        with pytest.raises(UserError, match='init="model:.*, now "model:'):
            build.build_training(changed, other, steps_saved=steps)


def test_a_full_disk_is_one_sentence_and_leaves_no_draft(run, albef, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write, "save_file", full)
    for form in ("albef", "huggingface"):
        with pytest.raises(UserError, match="could not be written to .*No space left on device"):
            export.export(run_config(albef, **{"export.format": form}), run)
    assert not [path.name for path in run.iterdir() if "export" in path.name]


def test_a_run_is_the_start_of_another_at_another_resolution(run, albef, monkeypatch):
    monkeypatch.chdir(run.parent)  # as a user would name it
    fields = {"init": f"model:{run.name}/", "model.image.size_px": 64, "data.tokenizer": ""}
    config = run_config(albef, **fields)
    read = start.read_start(config)
    assert start.tokenizer_of(config, read) == str(run / "tokenizer")
    task = pretrain.Pretraining(config, WORDS, one_mesh())
    first = start.initial(read, config, task.abstract_state())
    assert "image/positions 3x3 to 4x4 patches, bicubic" in first.report
    assert "step 0" in first.report
    stored = read_arrays(run / "checkpoints" / "0" / "teacher")
    np.testing.assert_array_equal(first.arrays["teacher/text/words"], stored["text/words"])
    assert first.arrays["teacher/image/positions"].shape == (1, 17, 72)
    for field, value, told in (
        ("codebook.size", 9, r"student/codebook/codes .*\[7, 24\], .*\[9, 24\]"),
        ("model.image.heads", 4, "3 heads, .*config.model.image.heads=4"),
    ):
        config = run_config(albef, init=f"model:{run}", **{field: value})
        with pytest.raises(UserError, match=told):
            started(config, WORDS)


def test_an_export_is_the_start_of_another_run_without_its_teacher(run, albef):
    export.export(None, run)
    config = run_config(albef, init=f"model:{run / 'export'}")
    _, first = started(config, WORDS)
    assert "an export" in first.report and "teacher: a copy of the student" in first.report
    stored = read_arrays(run / "export" / "student")
    assert_same({name: first.arrays[f"student/{name}"] for name in stored}, stored)


TWO = """
import os, sys
from types import SimpleNamespace
import jax
tests, weights, tokenizer, workdir = sys.argv[1:]
sys.path.insert(0, tests)
jax.distributed.initialize(num_processes=2, process_id=int(os.environ["JAX_PROCESS_ID"]))
sys.path.insert(0, os.path.join(tests, "weights"))
from test_import import run_config
from codebook_jax.tools.import_weights import import_weights
from codebook_jax.tools import export
albef = SimpleNamespace(file=weights, tokenizer=tokenizer)
config = run_config(albef, **{"mesh.fsdp": 2, "data.global_batch": 8, "export.format": "albef"})
import_weights(config, workdir)
export.export(config, workdir)
"""


@pytest.mark.slow
def test_two_processes_that_split_the_weights_import_and_export_them_bit_for_bit(albef, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    arguments = [Path(__file__).parents[1], albef.file, albef.tokenizer, tmp_path / "run"]
    both = together([[sys.executable, "-c", TWO, *map(str, arguments)]] * 2, environment)
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    exported = load_file(tmp_path / "run" / "export_albef" / "model.safetensors")
    assert_same(exported, albef.weights)


def test_the_towers_exported_for_hugging_face_are_read_again_bit_for_bit(run, albef):
    config = run_config(albef, **{"export.format": "huggingface"})
    export.export(config, run)
    folder = run / "export_huggingface"
    assert json.loads((folder / "text" / "config.json").read_text())["num_hidden_layers"] == 2
    init = f"image:{folder / 'image'},text:{folder / 'text'}"
    fields = {"init": init, "init_allow_partial": True, "data.tokenizer": ""}
    config = with_fields(config, fields)
    assert start.tokenizer_of(config, start.read_start(config)) == str(folder / "text")
    _, first = started(config, WORDS)
    stored = read_arrays(run / "checkpoints" / "0" / "student")
    found = {name[8:]: value for name, value in first.arrays.items() if name[:8] == "student/"}
    towers = ("towers/image/", "towers/text/")
    assert_same(found, {name: stored[name] for name in stored if name.startswith(towers)})


def test_an_albef_fine_tuned_for_retrieval_is_loaded_but_for_its_head(albef, tmp_path):
    """Its text encoder is a BertModel: other names, no head for masked words, queues of indices
    besides.
    """
    weights = {
        key.replace(".bert.", "."): value
        for key, value in albef.weights.items()
        if ".cls." not in key
    }
    weights |= {"idx_queue": np.zeros((1, 35), np.int64), "queue_ptr": np.array([10])}
    file = written(tmp_path / "tuned.safetensors", weights)
    config = run_config(albef, init=f"model:{file}")
    assert "lacks text_encoder.cls.predictions.bias" in refusal(config, WORDS)
    _, first = started(with_fields(config, {"init_allow_partial": True}), WORDS)
    assert "not of this model (idx_queue)" in first.report and "queues: loaded" in first.report
    assert first.arrays["queue/cursor"] == 10 and first.arrays["queue/filled"] == 35
    missing = [line for line in first.report.splitlines() if line.startswith("newly initialised")]
    assert missing[0].split()[-2:] == ["codebook,", "masked_words"]


def test_a_teacher_that_is_not_whole_is_completed_by_the_student(albef, tmp_path):
    left_out = ("visual_encoder_m.", "queue_ptr")
    weights = {key: albef.weights[key] for key in albef.weights if not key.startswith(left_out)}
    file = written(tmp_path / "part.safetensors", weights)
    config = run_config(albef, init=f"model:{file}", init_allow_partial=True)
    _, first = started(config, WORDS)
    copied = [name for name in first.arrays if name.startswith("teacher/image/")]
    assert f"teacher: loaded, except {len(copied)} arrays copied from the student" in first.report
    assert "part of a queue (2: image_queue, ...)" in first.report
    assert len(copied) > 10 and "queues: empty" in first.report
    for name in copied:
        student = first.arrays[f"student/towers/{name[8:]}"]
        np.testing.assert_array_equal(first.arrays[name], student)


def test_a_temperature_of_two_numbers_is_refused(albef, tmp_path):
    weights = albef.weights | {"temp": np.ones(2, np.float32)}
    file = written(tmp_path / "two.safetensors", weights)
    sentence = refusal(run_config(albef, init=f"model:{file}"), WORDS)
    assert "temp " in sentence and "[2], " in sentence


def test_words_without_a_tokenizer_are_refused_and_nothing_is_written(albef, tmp_path, one_device):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="has no tokenizer beside it"):
        import_weights(run_config(albef, **{"data.tokenizer": ""}), workdir)
    other = run_config(albef, **{"model.text.width": 30})
    with pytest.raises(UserError, match="config.model asks for"):
        import_weights(other, workdir)
    assert not (workdir / "config.json").exists() and not (workdir / "tokenizer").exists()
    with pytest.raises(UserError, match="config.init=random names no weights to import"):
        import_weights(run_config(albef, init="random"), workdir)
