"""What a run reports, from process 0: metrics.jsonl, TensorBoard and progress."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from codebook_jax.console import Bar, duration
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, written_whole

FILE = "metrics.jsonl"
Scalar = int | float | str | None


class Metrics:
    """The rows of `metrics.jsonl`, also written to TensorBoard; only process 0 writes.

    Opened at `step`, it removes the rows that a killed run wrote after the checkpoint of that step
    (with `redo_evaluation` its evaluation too), so that no resumed run leaves a row twice.
    """

    def __init__(self, workdir: Path | str, *, step: int, redo_evaluation: bool = False) -> None:
        self._file, self._events = None, None
        if jax.process_index() == 0:
            path = Path(workdir) / FILE
            if path.exists():
                _cut(path, step, redo_evaluation)
            self._file = open(path, "a", encoding="utf-8")
            purged = step + 1 if step else None
            self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=purged)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one row of Python or 0-d array values; values that are not finite become null."""
        if self._file is None:
            return
        row = {name: _value(scalar) for name, scalar in scalars.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()  # a killed process loses no row
        for name, value in row.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes every row to disk, which the next checkpoint relies on."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._events.flush()


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without those and the values that `Metrics` cannot have written;
    raises UserError if it is a folder.
    """
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not the rows of a run: move it away") from error
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63:
            rows.append({name: value for name, value in row.items() if _is_scalar(value)})
    return rows


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl is an evaluation's, not a training step's."""
    return any(name.startswith("eval/") for name in row)


class Clock:
    """Where the time of the steps since the last report went, in seconds."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._paused, self._steps = time.monotonic(), 0.0, 0.0, 0

    def waited(self, seconds: float) -> None:
        """Adds one step's wait for its batch."""
        self._waited += seconds
        self._steps += 1

    def paused(self, seconds: float) -> None:
        """Adds time that is not spent on training: saving, evaluating."""
        self._paused += seconds

    def report(self, global_batch: int) -> dict[str, float]:
        """The `time/...` scalars of the steps since the last report; then starts again."""
        spent = max(time.monotonic() - self._start - self._paused, 1e-9)
        steps, waited = max(self._steps, 1), self._waited
        self._reset()
        return {
            "time/step_s": spent / steps,
            "time/pairs_per_s": global_batch * steps / spent,
            "time/data_wait_share": min(waited / spent, 1.0),
        }


class ProgressReport:
    """On a terminal a bar with the time left, elsewhere a line per report; on process 0 alone."""

    def __init__(self, *, start: int, steps: int) -> None:
        self._steps, self._start = steps, start
        self._silent = jax.process_index() != 0
        self._bar: Bar | None = None
        self._pace: float | None = None  # seconds per step, lately

    def __enter__(self) -> ProgressReport:
        if not self._silent and sys.stderr.isatty():
            self._bar = Bar(self._steps, self._start, "compiling")
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step)

    def report(self, step: int, row: Mapping[str, Scalar]) -> None:
        """Shows a logged row: loss, pace, share of the time spent waiting for data, time left."""
        if self._silent:
            return
        step_s, loss = float(row["time/step_s"]), row["loss"]
        if step > self._start + 1:  # the first step compiles
            self._pace = step_s if self._pace is None else 0.7 * self._pace + 0.3 * step_s
        left = "" if self._pace is None else f"  {duration((self._steps - step) * self._pace)} left"
        known = loss is not None and math.isfinite(loss)
        text = (
            f"loss {f'{loss:.4g}' if known else 'not finite'}  {step_s:.3g} s/step  "
            f"{row['time/pairs_per_s']:.3g} pairs/s  "
            f"data wait {row['time/data_wait_share']:.0%}{left}"
        )
        if self._bar is not None:
            self._bar.update(step, text)
        else:
            print(f"step {step:,}/{self._steps:,}  {text}", file=sys.stderr, flush=True)


def _cut(path: Path, step: int, redo_evaluation: bool) -> None:
    """Removes the rows after `step`, and half-written ones, from a file."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if redo_evaluation:
        rows = [row for row in rows if row["step"] < step or not is_evaluation(row)]
    with written_whole(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63  # larger ones are no floats
    return isinstance(value, str | float | None)


def _value(scalar: Any) -> Scalar:
    if isinstance(scalar, str | None):
        return scalar
    number = scalar.item() if hasattr(scalar, "item") else scalar
    return number if math.isfinite(number) else None
