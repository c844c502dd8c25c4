"""Progress of long work on data: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time

import rich.progress
from rich.console import Console

_EVERY_S = 30.0


class Bar:
    """A bar on stderr, for a terminal, showing how many of `total` are done, and a text."""

    def __init__(self, total: int, done: int, text: str) -> None:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=Console(stderr=True),
            redirect_stdout=sys.stdout.isatty(),  # else a file's lines would show on the terminal
        )
        self._task = self._bar.add_task(text, total=total, completed=done)
        self._bar.start()

    def update(self, done: int, text: str | None = None) -> None:
        self._bar.update(self._task, completed=done, description=text)

    def stop(self) -> None:
        self._bar.stop()


class Progress(contextlib.AbstractContextManager):
    """Counts to `total`, `done` of them before this start; use it in a `with`."""

    def __init__(self, verb: str, unit: str, total: int, *, done: int = 0, skipped: int = 0):
        self._verb, self._unit, self._total = verb, unit, total
        self._before, self._done, self._skipped = done, done, skipped
        self._began = self._printed = time.monotonic()
        self._bar = Bar(total, done, "starting") if sys.stderr.isatty() else None

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, skipped: int = 0) -> None:
        """Adds `count` that are done, `skipped` of them left out."""
        self._done, self._skipped = self._done + count, self._skipped + skipped
        now = time.monotonic()
        pace = (self._done - self._before) / max(now - self._began, 1e-9)
        bad = f"  {self._skipped:,} skipped" if self._skipped else ""
        left = f"  {duration((self._total - self._done) / pace)} left" if pace else ""
        text = f"{pace:,.0f} {self._unit}/s{bad}{left}"
        if self._bar is not None:
            self._bar.update(self._done, text)
        elif now - self._printed >= _EVERY_S:
            self._printed = now
            line = f"{self._verb} {self._done:,}/{self._total:,}  {text}"
            print(line, file=sys.stderr, flush=True)


class Stages(contextlib.ExitStack):
    """Called with (unit, done, total), shows a Progress for each unit; use it in a `with`."""

    def __init__(self, verb: str, *, silent: bool = False) -> None:
        super().__init__()
        self._verb, self._silent, self._unit, self._done = verb, silent, "", 0

    def __call__(self, unit: str, done: int, total: int) -> None:
        if self._silent:
            return
        if unit != self._unit or done < self._done:
            self.close()
            self._progress = self.enter_context(Progress(self._verb, unit, total))
            self._unit, self._done = unit, 0
        self._progress.advance(done - self._done)
        self._done = done


def duration(seconds: float) -> str:
    """A time in the largest unit in which it is above one."""
    for limit, unit, each, digits in (
        (90, "s", 1, 0),
        (5400, "min", 60, 0),
        (172800, "h", 3600, 1),
    ):
        if seconds < limit:
            return f"{seconds / each:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"
