"""Signals that stop work: on data at once, a run once its step is saved; waiting that gives up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from codebook_jax.console import write_now

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A signal arrived. Not an Exception, so that handlers of library errors do not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stuck(Exception):
    """Something did not arrive in time."""


@contextlib.contextmanager
def _handled(handle: Callable[[int, object], None], respected: Sequence[int]) -> Iterator[None]:
    """Inside, `handle` gets SIGNALS, but none of `respected` that were ignored, as by nohup; none
    outside the main thread, where Python has no handlers.
    """
    ignored = [n for n in respected if signal.getsignal(n) is signal.SIG_IGN]
    main = threading.current_thread() is threading.main_thread()
    caught = [n for n in SIGNALS if main and n not in ignored]
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises Stopped, and later ones do not interrupt the clean-up."""

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    with _handled(stop, respected=SIGNALS):
        yield


class Interruption(contextlib.ExitStack):
    """Remembers, in a `with`, the first of SIGNALS; a second SIGINT exits at once."""

    name = ""  # of the signal, once it has come

    def __enter__(self) -> Interruption:
        self.enter_context(_handled(self._receive, respected=(signal.SIGHUP,)))
        return self

    def arrives_within(self, seconds: float) -> bool:
        """Waits for a signal that has killed a worker process but not yet reached this one."""
        end = time.monotonic() + seconds
        while not self.name and time.monotonic() < end:
            time.sleep(0.05)
        return bool(self.name)

    def _receive(self, number: int, frame: object) -> None:
        if self.name and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.name:
            self.name = signal.Signals(number).name
            write_now(
                f"\n{self.name}: ending once the steps so far are saved (Ctrl-C exits at once "
                "without saving)\n"
            )


@contextlib.contextmanager
def patience(limit_s: float, what: str) -> Iterator[None]:
    """Prints every tenth of `limit_s` that it waits for `what`, then raises Stuck; in the main
    thread alone.
    """
    began = time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

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


def serve_parent(ignored: Sequence[int] = SIGNALS) -> None:
    """Makes a worker process ignore these signals, which its parent handles, and end with it."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed, and could not end this process

    threading.Thread(target=end_with_parent, name="parent watch", daemon=True).start()
