"""What a run reports, from process 0: metrics.jsonl, TensorBoard and its pace."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from codebook_jax.console import Bar, duration
from codebook_jax.files import parse_json, written_whole

FILE, RESULTS = "metrics.jsonl", "eval.json"


class Metrics(contextlib.AbstractContextManager):
    """The rows of `metrics.jsonl`, also written to TensorBoard; only process 0 writes.

    Opened at `step`, it removes the rows that a killed run wrote after the checkpoint of that step
    (with `redo_evaluation` its evaluation too), so that no resumed run leaves a row twice.
    """

    def __init__(self, workdir: Path | str, *, step: int, redo_evaluation: bool = False) -> None:
        self._file, self._events = None, None
        if jax.process_index() == 0:
            path = Path(workdir) / FILE
            rows = [row for row in read_rows(path) if row["step"] <= step]
            if redo_evaluation:
                rows = [row for row in rows if row["step"] < step or not is_evaluation(row)]
            with written_whole(path) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file = open(path, "a", encoding="utf-8")
            purged = step + 1 if step else None
            self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=purged)

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
    """The rows of a metrics.jsonl, without what a killed run wrote half; none if it is missing."""
    path, rows = Path(path), []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl is an evaluation's, not a training step's; those of `between/`
    are of weights between the first and the last ones.
    """
    return any(name.startswith(("eval/", "between/")) for name in row)


class Pace:
    """Where the time of the steps goes; process 0 shows it, in a bar or as a line per report."""

    def __init__(self, *, start: int, steps: int, global_batch: int) -> None:
        self._start, self._steps, self._global_batch = start, steps, global_batch
        self._lately: float | None = None  # seconds per step
        self._bar: Bar | None = None
        self._reset()

    def _reset(self) -> None:
        self._since, self._waited, self._paused, self._count = time.monotonic(), 0.0, 0.0, 0

    def __enter__(self) -> Pace:
        if jax.process_index() == 0 and sys.stderr.isatty():
            self._bar = Bar(self._steps, self._start, "compiling")
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar is not None:
            self._bar.stop()

    def waited(self, seconds: float) -> None:
        """Adds one step's wait for its batch."""
        self._waited += seconds
        self._count += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside, which is not spent on training: saving, evaluating."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step)

    def report(self, step: int, loss: float | None) -> dict[str, float]:
        """The `time/...` scalars since the last report; shows them, the loss and the time left."""
        spent = max(time.monotonic() - self._since - self._paused, 1e-9)
        step_s, waited = spent / max(self._count, 1), min(self._waited / spent, 1.0)
        pairs_per_s = self._global_batch / step_s
        self._reset()
        left = ""
        if step > self._start + 1:  # the first step compiles
            self._lately = step_s if self._lately is None else 0.7 * self._lately + 0.3 * step_s
            left = f"  {duration((self._steps - step) * self._lately)} left"
        known = f"{loss:.4g}" if loss is not None and math.isfinite(loss) else "not finite"
        text = (
            f"loss {known}  {step_s:.3g} s/step  {pairs_per_s:.3g} pairs/s  "
            f"data wait {waited:.0%}{left}"
        )
        if self._bar is not None:
            self._bar.update(step, text)
        elif jax.process_index() == 0:
            print(f"step {step:,}/{self._steps:,}  {text}", file=sys.stderr, flush=True)
        return {
            "time/step_s": step_s,
            "time/pairs_per_s": pairs_per_s,
            "time/data_wait_share": waited,
        }


def _value(scalar: Any) -> int | float | str | None:
    if isinstance(scalar, str | None):
        return scalar
    number = scalar.item() if hasattr(scalar, "item") else scalar
    return number if math.isfinite(number) else None
