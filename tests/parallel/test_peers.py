"""What processes compare, and how they notice when another ends, with threads as processes."""

import os
import queue
import socket
import threading
import time

import pytest

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes import peers
from codebook_jax.parallel.processes.peers import Peers

HOST = socket.gethostname()


class Process:
    """One of `count` processes; what it would have ended with is in `ends`."""

    def __init__(self, offer, own, count):
        self.ends = queue.SimpleQueue()
        self.connection = peers.reach(offer, own)
        self.others = Peers(
            self.connection, count=count, own=own, give_up=lambda *ending: self.ends.put(ending)
        )

    def dies(self):
        socket.socket(fileno=os.dup(self.connection.fileno())).shutdown(socket.SHUT_RDWR)


def processes(count):
    offer, made = peers.open_channel(count, None), [None] * count

    def make(own):
        made[own] = Process(offer, own, count)

    run_threads(count, make)
    return made


def run_threads(count, act):
    threads = [threading.Thread(target=act, args=(own,)) for own in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def together(count, act):
    """What `act` returned or raised in each of `count` processes."""
    started, results = processes(count), [None] * count

    def one(own):
        try:
            results[own] = act(started[own].others)
        except Exception as error:
            results[own] = error

    run_threads(count, one)
    return results


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(peers, "GRACE_S", 0.5)
    monkeypatch.setattr(peers, "LINGER_S", 0.2)
    monkeypatch.setattr(peers, "SEEN_S", 0.5)


def test_processes_that_agree_pass_as_often_as_they_compare():
    def act(others):
        others.compare("start", {"a": 1}, "advice")
        others.compare("start", {"a": 2}, "advice")
        return others.exchange("own", others.own)

    assert together(3, act) == [[0, 1, 2]] * 3


def test_a_difference_is_named_with_its_process_host_and_both_values():
    facts = {"config.seed": 0, "version of jax": "1"}

    def act(others):
        own = {"config.seed": 7} if others.own == 2 else {}
        others.compare("start", facts | own, "start alike")

    for error in together(3, act):
        assert isinstance(error, UserError)
        assert f"process 2 on {HOST} differs in config.seed=7, on process 0 0: start" in str(error)


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(peers, "CHECK_S", 1.0)

    def act(others):
        others.exchange("first", None)
        if others.own != 1:
            others.exchange("workdir", None)

    first, missing, third = together(3, act)
    assert missing is None
    for error in (first, third):
        assert f"the check 'workdir' waited 1 s for process 1 on {HOST}" in str(error)


def test_one_folder_for_all_is_accepted_and_left_as_it_was(tmp_path):
    assert together(3, lambda others: others.check_folder(tmp_path / "run")) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_of_its_own_or_that_cannot_be_written_is_named_with_its_process(tmp_path):
    (tmp_path / "file").touch()
    for places, sentence in (
        (("run", "other"), f"process 1 on {HOST} does not see the file that process 0 wrote"),
        (("file/run", "file/run"), f"process 0 on {HOST} cannot write there (Not a directory)"),
    ):
        check = lambda others: others.check_folder(tmp_path / places[others.own])  # noqa: B023, E731
        for error in together(2, check):
            assert sentence in str(error)


def test_a_process_that_is_killed_ends_the_others_with_its_name():
    first, lost, third = processes(3)
    lost.dies()
    for survivor in (first, third):
        sentence, code = survivor.ends.get(timeout=20)
        assert code == 1 and f"ends: process 1 on {HOST} is lost" in sentence
        assert "goes on from the newest checkpoint" in sentence


@pytest.mark.parametrize("code", [1, 2])
def test_why_one_failed_reaches_the_others(code):
    first, failing, third = processes(3)
    failing.others.fail("the disk is full", code)
    failing.dies()
    for survivor in (first, third):
        sentence, own_code = survivor.ends.get(timeout=20)
        assert f"ends: process 1 on {HOST}: the disk is full" in sentence and own_code == code
        assert ("goes on" in sentence) == (code == 1)
    assert failing.ends.empty()


def test_processes_that_fail_of_the_same_end_with_their_own_sentences():
    both = processes(2)
    run_threads(2, lambda own: both[own].others.fail("not finite", 2))
    time.sleep(1)
    assert all(process.ends.empty() for process in both)


def test_a_process_that_is_done_is_not_taken_for_lost():
    first, done = processes(2)
    done.others._tell("left")
    done.dies()
    time.sleep(0.6)
    assert first.ends.empty()


def test_only_processes_with_the_token_are_let_in():
    offer = peers.open_channel(1, None)
    with pytest.raises(UserError, match="process 0 on .* no answer from process 0 at .*127.0.0.1"):
        peers.reach(offer[:-4] + 'abc"]', 0)
    peers.reach(offer, 0)


def test_a_process_alone_compares_with_nobody(tmp_path):
    alone = Peers()
    alone.compare("start", {"a": 1}, "advice")
    alone.check_folder(tmp_path / "run")
    alone.fail("nobody hears it")
    alone.leave()
    assert alone.exchange("start", 5) == [5] and not (tmp_path / "run").exists()
