"""The terminal: output that cannot be written never ends a run, Ctrl-C ends it with one sentence,
and long work shows how far it is: a bar on a terminal, a line every half minute elsewhere.

`command` runs before the imports that take a second: this module imports only the standard library.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

from codebook_jax.errors import FULL_DISK

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # read by glibc when a program starts
_LINE_EVERY_S = 30.0
_UNITS = ((90, "s", 1, 0), (5400, "min", 60, 0), (172_800, "h", 3600, 1))  # limit, unit, s, digits


def command() -> None:
    """Runs the command line and exits; the console script `codebook-jax`."""
    begin()
    from codebook_jax import main

    main.command()


def begin() -> None:
    """Makes Ctrl-C and unwritable output harmless, after a restart with huge pages on Linux."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # not a background job of a shell
        signal.signal(signal.SIGINT, _leave)
    # Without huge pages, a step on a CPU spends a quarter of its time on page faults.
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update(HUGE_PAGES)
        # Ctrl-C is blocked until the restarted program has a handler for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    keep_output()


def keep_output() -> None:
    """Makes stdout and stderr escape what they cannot encode and drop what cannot be written: all
    after a closed pipe or terminal, after a full disk only what did not fit.

    A standard stream that is closed becomes /dev/null: otherwise the next file opened would get its
    number and receive what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _discard(number)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        before = getattr(sys, name)  # None: it was closed
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Lasting(number, "w", closefd=False)),
            encoding="utf-8" if before is None else before.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, stream)


def say(text: str) -> None:
    """Prints a sentence to the user, on process 0 only."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def write_now(text: str) -> None:
    """Writes to stderr from a signal handler, which may have interrupted a print."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode("ascii", "backslashreplace"))


class Bar:
    """A bar on stderr, for a terminal, showing how many of `total` are done, and a text."""

    def __init__(self, total: int, done: int, text: str) -> None:
        import rich.console
        import rich.progress

        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=rich.console.Console(stderr=True),
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
        elif now - self._printed >= _LINE_EVERY_S:
            self._printed = now
            line = f"{self._verb} {self._done:,}/{self._total:,}  {text}"
            print(line, file=sys.stderr, flush=True)


class Stages(contextlib.ExitStack):
    """Called with (unit, done, total), shows a Progress for each unit; use it in a `with`."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self._verb, self._unit, self._done = verb, "", 0

    def __call__(self, unit: str, done: int, total: int) -> None:
        if unit != self._unit or done < self._done:
            self.close()
            self._progress = self.enter_context(Progress(self._verb, unit, total))
            self._unit, self._done = unit, 0
        self._progress.advance(done - self._done)
        self._done = done


def duration(seconds: float) -> str:
    """A time in the largest unit in which it is above one."""
    for limit, unit, each, digits in _UNITS:
        if seconds < limit:
            return f"{seconds / each:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt, so that drafts are removed; a second one
    exits at once. Does nothing in a process that did not call `begin`.
    """
    catches = signal.getsignal(signal.SIGINT) is _leave
    if catches:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if catches:
            signal.signal(signal.SIGINT, _leave)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


class _Lasting(io.FileIO):
    """A file descriptor whose writes never fail."""

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[os.write(self.fileno(), rest) :]
            except BlockingIOError:
                select.select([], [self.fileno()], [])
            except OSError as error:
                if error.errno not in FULL_DISK:  # there may be space again
                    _discard(self.fileno())
                break
        return len(data)


def _discard(number: int) -> None:
    """Discards everything written to a file descriptor from now on, by native code too."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def _leave(number: int, frame: object) -> None:
    """Exits at once: unwinding a half-done import prints traces."""
    write_now(f"stopped by {signal.Signals(number).name}\n")
    os._exit(128 + number)
