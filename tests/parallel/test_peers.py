"""What processes compare, and how they notice when another ends, with threads as processes and a
dict as JAX's store.
"""

import threading
import time

import pytest

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes import peers, shared_folder
from codebook_jax.parallel.processes.peers import Peers

# The thread that watches fails where the process would have ended.
ends_in_a_thread = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


class Store:
    """The parts of the key-value store of JAX's coordinator that are used."""

    def __init__(self, count):
        self.values, self.lock = {}, threading.Lock()
        self.count, self.barriers, self.gone = count, {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        with self.lock:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value

    def key_value_dir_get(self, prefix):
        self._answer()
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def wait_at_barrier(self, name, timeout_ms):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(self.count))
        barrier.wait(timeout_ms / 1000)

    def _answer(self):
        if self.gone:
            raise RuntimeError("UNAVAILABLE")


def together(count, act, **options):
    """What `act` returned or raised in each of `count` processes."""
    store, results = Store(count), [None] * count

    def one(own):
        try:
            results[own] = act(Peers(store, count=count, own=own, host=f"host{own}", **options))
        except Exception as error:
            results[own] = error

    threads = [threading.Thread(target=one, args=(own,)) for own in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_processes_that_agree_pass_as_often_as_they_compare():
    def act(others):
        others.compare("start", {"a": 1}, "advice")
        others.compare("start", {"a": 2}, "advice")
        return "passed"

    assert together(3, act) == ["passed"] * 3


def test_a_difference_is_named_with_its_process_host_and_both_values():
    facts = {"config.seed": 0, "version of jax": "1"}

    def act(others):
        others.compare(
            "start", facts | ({"config.seed": 7} if others.own == 2 else {}), "start alike"
        )

    for error in together(3, act):
        assert isinstance(error, UserError)
        assert (
            str(error) == "process 2 on host2 differs in config.seed=7, on process 0 0: start alike"
        )


def test_a_process_that_does_not_come_is_named():
    def act(others):
        others.exchange("first", None)
        if others.own != 1:
            others.exchange("workdir", None)

    first, missing, third = together(3, act, check_s=1.0)
    assert missing is None
    for error in (first, third):
        assert "the check 'workdir' waited 1 s for process 1 on host1: look at its log" in str(
            error
        )


def test_one_folder_for_all_is_accepted_and_left_as_it_was(tmp_path):
    assert together(3, lambda others: shared_folder.check(others, tmp_path / "run")) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_of_its_own_is_named_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_S", 0.5)

    def act(others):
        shared_folder.check(others, tmp_path / ("other" if others.own == 1 else "run"))

    for error in together(2, act):
        assert (
            "is not one folder for all processes: process 1 on host1 does not see the file"
            in str(error)
        )


def test_a_folder_that_one_process_cannot_write_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SEEN_S", 0.5)
    (tmp_path / "file").write_text("")
    for error in together(2, lambda others: shared_folder.check(others, tmp_path / "file" / "run")):
        assert "process 0 on host0 cannot write there (Not a directory)" in str(error)


def test_clocks_that_are_apart_are_said(monkeypatch):
    real = time.time
    skew = lambda: real() + (100 if threading.current_thread().name == "late" else 0)  # noqa: E731
    monkeypatch.setattr(peers.time, "time", skew)

    def act(others):
        threading.current_thread().name = "late" if others.own == 1 else "right"
        return others.clocks()

    for sentence in together(2, act):
        assert sentence.startswith("the clock of process 1 on host1 is 100 s off that of process 0")
    monkeypatch.undo()
    assert together(2, lambda others: others.clocks()) == ["", ""]


class Ends:
    """Records where a process would have exited."""

    def __init__(self):
        self.sentences = []

    def __call__(self, sentence, code):
        self.sentences.append((sentence, code))
        raise SystemExit


def watching(store, own, ends, **options):
    settings = dict(beat_s=0.02, lost_s=0.3) | options
    others = Peers(store, count=2, own=own, host=f"host{own}", give_up=ends, **settings)
    others.watch()
    return others


def until(ready, limit_s=20):
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_is_not_heard_of_ends_the_others(monkeypatch):
    monkeypatch.setattr(peers, "LINGER_S", 0.1)
    store, ends, quiet = Store(2), Ends(), Ends()
    watching(store, 0, ends)
    lost = watching(store, 1, quiet)
    time.sleep(0.1)
    assert ends.sentences == []
    lost._stop.set()  # as a process that is gone
    until(lambda: ends.sentences)
    ((sentence, code),) = ends.sentences
    assert code == 1 and "process 1 has not been heard of for 0 s" in sentence
    assert "goes on from the newest checkpoint" in sentence


@ends_in_a_thread
def test_why_one_failed_reaches_the_others(monkeypatch):
    monkeypatch.setattr(peers, "LINGER_S", 0.1)
    store, ends = Store(2), Ends()
    watching(store, 0, ends)
    watching(store, 1, Ends()).fail("the disk is full")
    until(lambda: ends.sentences)
    assert "process 0 on host0 ends: process 1 on host1: the disk is full" in ends.sentences[0][0]


def test_a_process_that_is_done_is_not_taken_for_lost():
    store, ends = Store(2), Ends()
    watching(store, 0, ends)
    done = watching(store, 1, Ends())
    done._leave_mark()
    done._stop.set()
    time.sleep(0.6)
    assert ends.sentences == []


@ends_in_a_thread
def test_a_coordinator_that_does_not_answer_ends_the_others():
    store, ends = Store(2), Ends()
    watching(store, 1, ends)
    store.gone = True
    until(lambda: ends.sentences)
    assert "process 0, the coordinator, cannot be reached (UNAVAILABLE)" in ends.sentences[0][0]


def test_a_process_alone_compares_with_nobody(tmp_path):
    alone = Peers()
    alone.compare("start", {"a": 1}, "advice")
    shared_folder.check(alone, tmp_path / "run")
    alone.watch()
    alone.fail("nobody hears it")
    alone.leave()
    assert alone.exchange("start", 5) == [5] and not (tmp_path / "run").exists()
