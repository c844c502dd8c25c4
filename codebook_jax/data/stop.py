"""Stops long work on data on a signal: at once, keeping what is saved, and ending its workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):
    """A signal arrived. Not an Exception, so that handlers of library errors do not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises Stopped, and later ones do not interrupt the clean-up."""

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # set by nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_parent(ignored: Sequence[int] = SIGNALS) -> None:
    """Makes a worker process ignore these signals, which its parent handles, and end with it."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed, and could not end this process

    threading.Thread(target=end_with_parent, name="parent watch", daemon=True).start()
