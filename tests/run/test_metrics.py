"""metrics.jsonl is always valid, and a resumed run leaves the rows of an uninterrupted one."""

import io
import json
import re
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from codebook_jax import console
from codebook_jax.errors import UserError
from codebook_jax.run.interruption import Interrupted, Interruption
from codebook_jax.run.metrics import Clock, Metrics, ProgressReport, read_rows


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_one_json_object_and_what_is_not_finite_is_null(tmp_path):
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


def test_a_row_is_on_file_as_soon_as_it_is_written(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(1, {"loss": 2.0})
        assert rows_of(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_resuming_cuts_the_rows_after_the_checkpoint_and_a_half_written_line(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with Metrics(tmp_path, step=5) as metrics:
        metrics.write(6, {"loss": -1.0})
    assert rows_of(tmp_path) == [
        *({"step": s, "loss": 1 / s} for s in range(1, 6)),
        {"step": 6, "loss": -1.0},
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_an_evaluation_that_was_not_recorded_with_its_checkpoint_is_cut_to_be_done_again(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(5, {"loss": 1.0})
        metrics.write(5, {"eval/txt_r1": 2.0})
        metrics.write(10, {"loss": 0.5})
        metrics.write(10, {"eval/txt_r1": 3.0})
    with Metrics(tmp_path, step=10, redo_evaluation=True):
        pass
    assert [sorted(row) for row in rows_of(tmp_path)] == [
        ["loss", "step"],
        ["eval/txt_r1", "step"],
        ["loss", "step"],
    ]


def test_rows_and_values_that_no_run_has_written_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = ("null", '"x"', "1e400", "1.5", "true", "[1]", "-1", "9" * 400, "[" * 100_000)
    rows = [f'{{"step": {step}, "loss": 3}}' for step in steps]
    rows += ['{"step": 2, "lo{"step": 2, "loss": 2.0}', '{"step": 3']
    large = "1" + "0" * 400
    last = f'"loss": [1], "other": {{}}, "large": {large}, "kept": null, "text": "x"'
    path.write_text("\n".join([*rows, f'{{"step": 7, {last}}}', '{"step": ']))
    assert read_rows(path) == [{"step": 7, "kept": None, "text": "x"}]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=str(path)):
        read_rows(path)


def test_tensorboard_reads_the_scalars_back(tmp_path):
    with Metrics(tmp_path, step=0) as metrics:
        metrics.write(1, {"loss": 2.5, "bad/terms": "a word"})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes() and events.stat().st_size > 60


def test_the_clock_leaves_saving_and_evaluating_out_of_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("codebook_jax.run.metrics.time.monotonic", lambda: now[0])
    clock = Clock()
    for _ in range(4):
        now[0] += 0.5
        clock.waited(0.1)
    now[0] += 30
    clock.paused(30.0)
    row = clock.report(global_batch=64)
    assert row["time/step_s"] == pytest.approx(0.5)
    assert row["time/pairs_per_s"] == pytest.approx(128)
    assert row["time/data_wait_share"] == pytest.approx(0.2)


def report(step_s=0.5):
    return {
        "loss": 7.1234567,
        "time/step_s": step_s,
        "time/pairs_per_s": 64 / step_s,
        "time/data_wait_share": 0.031,
    }


def test_where_stderr_is_no_terminal_progress_is_a_line_with_the_time_left(capsys):
    with ProgressReport(start=40, steps=1040) as progress:
        progress.report(41, report(step_s=60.0))  # it compiled: no forecast from it
        progress.report(50, report())
        progress.advance(51)
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert (
        second.startswith("step 50/1,040  loss 7.123")
        and "data wait 3%" in second
        and "8 min left" in second
    )


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with ProgressReport(start=0, steps=10) as progress:
        progress.advance(5)
        progress.report(5, report())
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert "5/10" in shown and "loss 7.123" in shown


def test_a_signal_is_remembered_and_the_old_handlers_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    with Interruption() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.name == "SIGTERM" and stop.arrives_within(seconds=0)
        signal.raise_signal(signal.SIGTERM)  # schedulers send more than one
    assert before == {number: signal.getsignal(number) for number in before}


def test_a_terminal_that_closes_does_not_end_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
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


def test_a_signal_cuts_short_only_what_may_be_interrupted():
    with Interruption() as stop, pytest.raises(Interrupted), stop.may_interrupt():
        signal.raise_signal(signal.SIGUSR1)
        raise AssertionError("not reached")
    with Interruption() as stop:
        with stop.may_interrupt():
            pass
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted), stop.may_interrupt():
            raise AssertionError("not begun once a signal has come")


def test_a_second_ctrl_c_leaves_at_once():
    script = """
        import signal, sys
        from codebook_jax.run.interruption import Interruption
        with Interruption():
            signal.raise_signal(signal.SIGINT)
            print("still here", flush=True)
            signal.raise_signal(signal.SIGINT)
            print("not reached", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 130 and done.stdout == "still here\n" and "SIGINT" in done.stderr
