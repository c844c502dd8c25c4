"""Signals that end a run once the step in progress is saved, and waiting that gives up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from codebook_jax.console import write_now
from codebook_jax.data.stop import SIGNALS


class Stuck(Exception):
    """Something did not arrive in time."""


@contextlib.contextmanager
def patience(limit_s: float, what: str) -> Iterator[None]:
    """Prints every tenth of `limit_s` that it waits for `what`, then raises Stuck; main thread."""
    began = time.monotonic()

    def ring(number: int, frame: object) -> None:
        waited = time.monotonic() - began
        if waited > 0.95 * limit_s:
            raise Stuck(f"{what} did not come in {limit_s:.0f} s")
        write_now(f"waiting for {what} for {waited:.0f} s; after {limit_s:.0f} s the run ends\n")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s / 10, limit_s / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Interruption:
    """Remembers the first of SIGTERM, SIGINT, SIGUSR1 and SIGHUP; a second SIGINT exits at once.

    Use it in a `with`, in the main thread. An ignored SIGHUP, as under nohup, stays ignored.
    """

    name: str | None = None

    def __enter__(self) -> Interruption:
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        caught = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._receive) for number in caught}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.name is not None

    def arrives_within(self, seconds: float) -> bool:
        """Waits for a signal that has killed a worker process but not yet reached this one."""
        end = time.monotonic() + seconds
        while not self.requested and time.monotonic() < end:
            time.sleep(0.05)
        return self.requested

    def _receive(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.requested:
            self.name = signal.Signals(number).name
            write_now(
                f"\n{self.name}: ending once the steps so far are saved (Ctrl-C exits at once "
                "without saving)\n"
            )
