"""Signals that stop work on data, and those that do not."""

import signal
import threading

import pytest

from codebook_jax.stop import Stopped, patience, stoppable


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a background job of a shell
    try:
        with stoppable():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped), stoppable():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_in_another_thread_runs_without_handlers():
    done = []

    def work():
        with stoppable(), patience(60, "nothing"):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
