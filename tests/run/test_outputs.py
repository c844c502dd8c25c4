"""Every mode checks that it can write before it loads anything, and shows results before it writes
them.
"""

import contextlib
import errno
import os
from types import SimpleNamespace

import pytest

from codebook_jax import build, files, train
from codebook_jax.build import restore_trained
from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError
from codebook_jax.run.ownership import owned
from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.task import Evaluation
from codebook_jax.tools import check_data, evaluate, export, prepare
from codebook_jax.tools.chips import PlanOptions
from codebook_jax.tools.import_weights import import_weights
from codebook_jax.tools.plan import plan
from configs import base


def config_of(**changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("too late to refuse")

    config = config_of()  # made without reading weights
    trained = SimpleNamespace(config=config, task=build.task_class(config))
    monkeypatch.setattr(build, "build_trained", lambda *_: trained)
    for module, name in (
        (build, "build_training"),
        (build, "restore_trained"),
        (build, "task_maker"),
        (prepare, "source_of"),
        (check_data, "source_of"),
    ):
        monkeypatch.setattr(module, name, load)


IMPORT = {"init": "model:weights.pth"}
MODES = {
    "train": lambda workdir: train.fit(config_of(), workdir),
    "import": lambda workdir: import_weights(config_of(**IMPORT), workdir),
    "eval": lambda workdir: evaluate.evaluate(None, workdir),
    "export": lambda workdir: export.export(None, workdir),
    "prepare": lambda workdir: prepare.prepare(config_of(), workdir),
    "check-data": lambda workdir: check_data.check_data(config_of(), workdir),
    "plan": lambda workdir: plan(config_of(), PlanOptions(json=str(workdir / "plan.json"))),
}
WRITTEN = (
    ("train", "metrics.jsonl", "file"),
    ("train", "checkpoints", "folder"),
    ("import", "config.json", "file"),
    ("import", "tokenizer", "folder"),
    ("eval", "eval.json", "file"),
    ("eval", "cache", "folder"),
    ("export", "export", "folder"),
    ("prepare", "manifest.json", "file"),
    ("check-data", "report.html", "file"),
    ("check-data", "check.json", "file"),
    ("plan", "plan.json", "file"),
)


@pytest.mark.parametrize("mode, name, kind", WRITTEN)
def test_a_folder_in_place_of_a_file_or_the_reverse_is_refused_at_the_start(
    mode, name, kind, tmp_path
):
    if kind == "file":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{tmp_path / name} .*\b{kind}\b"):
        MODES[mode](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("mode", MODES)
def test_a_place_that_cannot_be_written_is_refused_at_the_start(
    mode, number, tmp_path, monkeypatch
):
    def probe(folder):
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(files, "write_probe", probe)
    with pytest.raises(UserError) as refusal:
        MODES[mode](tmp_path)
    assert str(tmp_path) in str(refusal.value) and os.strerror(number) in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "export"])
@pytest.mark.parametrize(
    "place", ["/proc/run", "file/run", "n" * 300], ids=["proc", "file", "long"]
)
def test_a_place_that_cannot_be_is_refused_at_the_start(mode, place, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as refusal:
        MODES[mode](tmp_path / place)
    assert str(tmp_path / place) in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_too_long_is_refused_at_the_start_and_the_longest_can_be_written(tmp_path):
    with pytest.raises(UserError, match=os.strerror(errno.ENAMETOOLONG)):
        files.check_outputs(tmp_path, ("n" * 256,))
    files.check_outputs(tmp_path, ("n" * 255,))
    files.write_json(tmp_path / ("n" * 255), {})
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


@pytest.mark.parametrize(
    "mode, file",
    [
        ("train", ".running"),
        ("import", ".running"),
        ("eval", ".cache.running"),
        ("export", ".export.running"),
    ],
)
def test_a_workdir_evaluation_or_export_in_use_is_refused_at_the_start(mode, file, tmp_path):
    with owned(tmp_path, file), pytest.raises(UserError, match=f"process {os.getpid()} "):
        MODES[mode](tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"new": float("nan")})

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        files.write_json(tmp_path / "a.json", {"new": 1})
    assert files.parse_json((tmp_path / "a.json").read_bytes()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_two_that_write_one_file_at_once_leave_the_whole_of_one(tmp_path):
    path = tmp_path / "eval.json"
    with files.written_whole(path) as one:
        with files.written_whole(path) as two:  # on another host, with the same process number
            two.write("two")
        one.write("one")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


class NoImages(Source):
    def __len__(self):
        return 0


def test_an_evaluation_is_shown_though_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    def evaluated(*_, **__):
        with pytest.raises(UserError, match="is in use by process"):  # whatever the task
            evaluate.evaluate(None, tmp_path)
        (tmp_path / "eval.json").mkdir()  # since it was looked at
        return Evaluation({"student/dual": {}}, {}, 0.0, "", "", "R@1 12.34")

    parts = dict(checkpoint_items=Pretraining.checkpoint_items, evaluate=evaluated)
    parts["check_data"] = lambda *_: None
    task = SimpleNamespace(**parts, reads="pairs", evaluates=(), resumes=False)
    monkeypatch.setattr(build, "restore_trained", lambda *_: SimpleNamespace(state=None))
    monkeypatch.setattr(evaluate, "source_of", lambda *_, **__: NoImages())
    parts = SimpleNamespace(config=config_of(), task=task, tokenizer=None)
    monkeypatch.setattr(build, "build_trained", lambda *_: parts)
    with pytest.raises(UserError, match="eval.json cannot be written"):
        evaluate.evaluate(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert "12.34" in capsys.readouterr().out


def test_a_checkpoint_that_training_removed_is_not_called_damaged(tmp_path, monkeypatch):
    class Removed:
        step_to_use = best_step = lambda self: 5

        def restore(self, *_):
            raise FileNotFoundError("5")

    task = SimpleNamespace(
        checkpoint_items=Pretraining.checkpoint_items, abstract_state=lambda: None
    )
    parts = SimpleNamespace(config=config_of(), task=task)
    monkeypatch.setattr(build, "Checkpoints", lambda *_, **__: contextlib.nullcontext(Removed()))
    with pytest.raises(UserError, match="step 5 .*same command again"):
        restore_trained(parts, tmp_path, ("student",))
