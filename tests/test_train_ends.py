"""How a run ends before its last step, with a one-weight model, and that the next start continues
from there.
"""

import os
import signal
import threading
import time

import numpy as np
import pytest
from one_weight import assert_same_run, config_of, final_weight, make_world, saved_steps

from codebook_jax import train
from codebook_jax.errors import UserError


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_good_checkpoints(
    world, tmp_path, capsys
):
    world.poisoned = set(range(5, 100))
    config = config_of(**{"train.steps": 50, "optimizer.max_bad_steps": 6, "checkpoint.keep": 1})
    words = r"step 11: 6 steps in a row were not finite \(loss/broken\).*step 4 "
    with pytest.raises(UserError, match=words):
        train.fit(config, tmp_path)
    assert "step 8 is not saved: 3 steps were not finite" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [4]
    assert np.isfinite(final_weight(tmp_path, 4)).all()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of twelve steps."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        make_world(patch)
        train.fit(config_of(), workdir)
    return workdir


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_the_step_in_progress_and_the_next_start_goes_on_exactly(
    name, world, undisturbed, tmp_path, capsys
):
    number = getattr(signal, name)
    sent = [number] if name == "SIGINT" else [number] * 2  # schedulers send more than one
    world.before_batch = lambda step: step == 6 and [signal.raise_signal(one) for one in sent]
    handler = signal.getsignal(number)
    assert train.fit(config_of(), tmp_path) is False  # not at its end
    assert f"saved step 7 on {name}" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [4, 6, 7]
    assert signal.getsignal(number) is handler
    world.before_batch = lambda step: None
    assert train.fit(config_of(), tmp_path) is True
    assert_same_run(tmp_path, undisturbed)


def test_workers_that_die_of_the_same_signal_do_not_keep_the_run_from_saving(
    world, tmp_path, capsys
):
    def die(step):
        if step == 6:
            # The signal reaches this process after its workers.
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -15")

    world.before_batch = die
    train.fit(config_of(), tmp_path)
    assert "saved step 6 on SIGTERM" in capsys.readouterr().out and saved_steps(tmp_path)[-1] == 6


def test_a_batch_that_does_not_come_is_waited_for_aloud_then_the_step_is_saved_and_the_run_ends(
    world, undisturbed, tmp_path, monkeypatch, capfd
):
    class Ended(BaseException):
        pass

    def end(sentence, code):
        raise Ended(sentence, code)

    monkeypatch.setattr(train, "end", end)  # it would leave this process
    world.before_batch = lambda step: step == 7 and time.sleep(60)
    config = config_of(**{"data.patience_s": 1.0})
    with pytest.raises(Ended) as ended:
        train.fit(config, tmp_path)
    sentence, code = ended.value.args
    assert "batch of step 8 did not come in 1 s; step 7 is saved" in sentence and code == 1
    assert "waiting for the batch of step 8 for 0 s; after 1 s " in capfd.readouterr().err
    world.before_batch = lambda step: None
    train.fit(config, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_workers_that_die_of_something_else_end_the_run(world, tmp_path, monkeypatch):
    def die(step):
        if step == 6:
            raise RuntimeError("a worker died")

    monkeypatch.setattr(train.Interruption, "arrives_within", lambda self, seconds: False)
    world.before_batch = die
    with pytest.raises(RuntimeError, match="a worker died"):
        train.fit(config_of(), tmp_path)
    assert saved_steps(tmp_path) == [4, 6]


def test_an_evaluation_that_a_signal_cut_short_is_done_at_the_next_start(world, tmp_path, capsys):
    train.fit(config_of(), tmp_path / "straight")
    world.during_evaluation = lambda: signal.raise_signal(signal.SIGTERM)
    train.fit(config_of(), tmp_path / "cut")
    assert "saved step 6 on SIGTERM" in capsys.readouterr().out
    world.during_evaluation = lambda: None
    train.fit(config_of(), tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "straight")
    best, other = ((tmp_path / name / "best.json").read_text() for name in ("cut", "straight"))
    assert best == other
