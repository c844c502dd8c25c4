"""metrics.jsonl is always valid, and a resumed run leaves the rows of an uninterrupted one."""

import io
import json
import re
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import ran

from codebook_jax import console
from codebook_jax.run.metrics import Metrics, Pace
from codebook_jax.stop import Interruption


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_one_json_object_at_once_and_what_is_not_finite_is_null(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(3, {"loss": jnp.float32(0.1), "count": jnp.int32(4)})
        metrics.write(4, {"bad": np.float32(np.nan), "worse": -np.inf, "words": "loss/matching"})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {"step": 3, "loss": float(np.float32(0.1)), "count": 4}
    assert isinstance(first["count"], int)
    assert second == {"step": 4, "bad": None, "worse": None, "words": "loss/matching"}
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_an_evaluation_that_was_not_recorded_with_its_checkpoint_is_cut_to_be_done_again(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(5, {"loss": 1.0})
        metrics.write(5, {"eval/txt_r1": 2.0})
        metrics.write(10, {"loss": 0.5})
        metrics.write(10, {"eval/txt_r1": 3.0})
    with Metrics(tmp_path, step=10, redo_evaluation=True):
        pass
    kept = [(row["step"], "loss" in row) for row in rows_of(tmp_path)]
    assert kept == [(5, True), (5, False), (10, True)]


@pytest.fixture
def now(monkeypatch):
    """What time it is."""
    now = [100.0]
    monkeypatch.setattr("codebook_jax.run.metrics.time.monotonic", lambda: now[0])
    return now


def steps_of(pace, now, count, *, step_s=0.5):
    for _ in range(count):
        now[0] += step_s
        pace.waited(0.1)


def test_saving_and_evaluating_are_left_out_of_the_pace(now):
    pace = Pace(start=0, steps=100, global_batch=64)
    steps_of(pace, now, 4)
    with pace.paused():
        now[0] += 30
    row = pace.report(4, 7.0)
    assert row["time/step_s"] == pytest.approx(0.5)
    assert row["time/pairs_per_s"] == pytest.approx(128)
    assert row["time/data_wait_share"] == pytest.approx(0.2)


def test_where_stderr_is_no_terminal_the_pace_is_a_line_with_the_time_left(now, capsys):
    with Pace(start=40, steps=1040, global_batch=64) as pace:
        steps_of(pace, now, 1, step_s=60)
        pace.report(41, None)  # it compiled: no forecast from it
        steps_of(pace, now, 9)
        pace.report(50, 7.1234567)
        pace.advance(51)
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first and "not finite" in first
    assert second.startswith("step 50/1,040  loss 7.123") and "data wait 20%" in second
    assert "8 min left" in second


def test_on_a_terminal_the_pace_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Pace(start=0, steps=10, global_batch=64) as pace:
        pace.advance(5)
        pace.report(5, 7.1234567)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert "5/10" in shown and "loss 7.123" in shown


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_stages_of_a_long_work_are_each_told_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "_LINE_EVERY_S", 0)
    with console.Stages("evaluated") as stages:
        for unit, done in (("images", 2), ("images", 4), ("texts", 3), ("texts", 5), ("texts", 1)):
            stages(unit, done, 5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "3/5", "5/5", "1/5"]
    assert all(" left" in line for line in lines) and "texts/s" in lines[2]


def test_a_second_ctrl_c_leaves_at_once():
    script = """if True:
        import signal
        from codebook_jax.stop import Interruption
        with Interruption():
            for said in ("still here", "not reached"):
                signal.raise_signal(signal.SIGINT)
                print(said, flush=True)
    """
    done = ran([sys.executable, "-c", script])
    assert done.returncode == 130 and done.stdout == "still here\n" and "SIGINT" in done.stderr
