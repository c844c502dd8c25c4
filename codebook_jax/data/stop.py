"""How a long work on data ends before its end: by a signal, at once, with what it has kept; its workers with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A signal arrived. Not an Exception: what catches failures of a library lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises Stopped, and further ones do not disturb what it ends.

    Outside the main thread, where Python has no handlers, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_parent(ignored: Sequence[int] = SIGNALS) -> None:
    """What a worker process does first: it leaves these signals to its parent, which ends it, and does not outlive it.

    A terminal and a scheduler send them to every process.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_outlive_nobody, name="parent watch", daemon=True).start()


def _outlive_nobody() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # it was killed, and could not end this process
