"""How far a long work on data is: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

_EVERY_S = 30.0


class Progress:
    """Counts to `total`; use it in a `with`."""

    def __init__(
        self, verb: str, unit: str, total: int, *, done: int = 0, skipped: int = 0
    ) -> None:
        """`done` of `total` were done before: the pace is that of the others."""
        self._verb, self._unit, self._total = verb, unit, total
        self._before, self._done, self._skipped = done, done, skipped
        self._began = self._said = time.monotonic()
        self._bar, self._task = None, None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("starting", total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, skipped: int = 0) -> None:
        """`count` more are done, of which so many skipped."""
        self._done, self._skipped = self._done + count, self._skipped + skipped
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._text(now))
        elif now - self._said >= _EVERY_S:
            self._said = now
            counts = f"{self._verb} {self._done:,}/{self._total:,}"
            print(f"{counts}  {self._text(now)}", file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        pace = (self._done - self._before) / max(now - self._began, 1e-9)
        bad = f"  {self._skipped:,} skipped" if self._skipped else ""
        left = f"  {_duration((self._total - self._done) / pace)} left" if pace else ""
        return f"{pace:,.0f} {self._unit}/s{bad}{left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
