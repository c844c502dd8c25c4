"""`--mode=eval` that was killed goes on where it was, with the same weights, data and settings."""

import json
import shutil
import signal

import jax
import pytest
from small_run import command, config_of, ran

from codebook_jax import build
from codebook_jax.evaluation import stage
from codebook_jax.tools import evaluate

IMAGES = {"evaluation.images": 40}  # in 5 calls; their 40 texts in 5, some 80 pairs in 10
KILLED_IN = {"images": 3, "texts": 8, "pairs": 14}


@pytest.fixture
def workdir(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "RECORD_EVERY_S", 0.0)
    return shutil.copytree(straight.workdir, tmp_path / "run")


def results(workdir):
    return json.loads((workdir / "eval.json").read_text())


def kill(workdir, after, **changes):
    """Evaluates until `after` calls are made."""
    made = 0

    def write(*given):
        nonlocal made
        real(*given)
        made += 1
        if made == after:
            raise KeyboardInterrupt

    real = stage.Stage.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage.Stage, "write", write)
        evaluate.evaluate(config_of(**IMAGES | changes), workdir)


@pytest.mark.usefixtures("one_device")
def test_an_evaluation_goes_on_and_leaves_what_one_that_was_not_killed_leaves(workdir, capsys):
    evaluate.evaluate(config_of(**IMAGES), workdir)
    expected, files = results(workdir), sorted(path.name for path in workdir.iterdir())
    assert "cache" not in files and "goes on" not in capsys.readouterr().out
    (workdir / "eval.json").unlink()
    for name, after in KILLED_IN.items():
        kill(workdir, after)
        assert (workdir / "cache" / "0" / name).is_dir() and not (workdir / "eval.json").exists()
        evaluate.evaluate(config_of(**IMAGES), workdir)
        assert f"{name} are done already" in capsys.readouterr().out
        assert results(workdir) == expected
        assert sorted(path.name for path in workdir.iterdir()) == files
        (workdir / "eval.json").unlink()


@pytest.mark.usefixtures("one_device")
def test_other_weights_settings_or_images_begin_anew(workdir, capsys, monkeypatch):
    for changes in ({"evaluation.rerank_score": "log_odds"}, {"evaluation.images": 39}):
        kill(workdir, 3)
        evaluate.evaluate(config_of(**IMAGES | changes), workdir)
        assert not (workdir / "cache").exists()
    kill(workdir, 3)
    real = build.restore_trained

    def other(*given):
        found = real(*given)
        return found._replace(state=jax.tree.map(lambda leaf: 1.001 * leaf, found.state))

    monkeypatch.setattr(build, "restore_trained", other)
    evaluate.evaluate(config_of(**IMAGES), workdir)
    assert "goes on" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_goes_on_after_sigkill(workdir, one_device_environment):
    words = [*command(workdir, **IMAGES), "--mode=eval"]
    done = ran(words, one_device_environment)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = results(workdir)
    (workdir / "eval.json").unlink()
    for name, after in KILLED_IN.items():
        done = ran(words, one_device_environment | {"FAULT": f"kill-evaluation:*:{after}"})
        assert done.returncode == -signal.SIGKILL and not (workdir / "eval.json").exists()
        done = ran(words, one_device_environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{name} are done already" in done.stdout and results(workdir) == expected
        (workdir / "eval.json").unlink()
    assert not (workdir / "cache").exists()
