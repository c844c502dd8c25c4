"""One process at a time owns a folder, wherever it runs, and a dead one blocks nobody."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import owner
import pytest
from small_run import ROOT

from codebook_jax.errors import UserError
from codebook_jax.run import ownership
from codebook_jax.run.ownership import owned

# a watch is longer on a machine that does much else
AT_ONCE_S = owner.WATCH_S / 2 + ownership.CLAIM_S


@pytest.fixture
def start():
    """Starts a process that wants to own a folder; all are killed at the end."""
    started = []

    def start(folder, **environment):
        command = [sys.executable, ROOT / "tests" / "owner.py", folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(
            command, env=environment, text=True, start_new_session=True, **pipes
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", owner.BEAT_S)
    monkeypatch.setattr(ownership, "WATCH_S", owner.WATCH_S)


def answer(process):
    """What the process ends up with, and after how many seconds."""
    began = time.monotonic()
    for line in process.stdout:
        if line.startswith(("owns", "refused")):
            return line, time.monotonic() - began
    raise AssertionError(process.stderr.read())


def record_of(folder):
    return json.loads((folder / ".running").read_text())


def test_a_second_process_is_told_who_owns_the_folder_until_the_first_leaves(start, tmp_path):
    first = start(tmp_path)
    assert answer(first)[0] == "owns\n"
    record = record_of(tmp_path)
    refusal, _ = answer(start(tmp_path))
    assert record["pid"] == first.pid and "owner.py" in record["command"]
    for value in (tmp_path, first.pid, os.uname().nodename, record["since"]):
        assert str(value) in refusal
    first.communicate("")
    assert list(tmp_path.iterdir()) == []
    assert answer(start(tmp_path))[0] == "owns\n"


def test_a_killed_owner_that_nobody_waited_for_is_gone_at_once(start, tmp_path):
    first = start(tmp_path)
    answer(first)
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    os.kill(first.pid, 0)
    said, seconds = answer(start(tmp_path))
    assert said == "owns\n" and seconds < AT_ONCE_S


def test_another_process_that_got_the_owners_number_is_not_the_owner(quick, tmp_path, capsys):
    with owned(tmp_path):
        record = record_of(tmp_path)
    (tmp_path / ".running").write_text(json.dumps(record | {"started": "1"}))
    with owned(tmp_path):
        assert record_of(tmp_path)["token"] != record["token"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "where", [{"HOST": "elsewhere", "BOOT": "another"}, {"PID_NAMESPACE": "pid:[1]"}], ids=str
)
def test_an_owner_on_another_host_or_in_a_container_counts_as_long_as_its_beat_moves(
    where, start, tmp_path, quick
):
    first = start(tmp_path, **where)
    answer(first)
    with pytest.raises(UserError, match=f"process {first.pid} on "), owned(tmp_path):
        pass
    first.kill()
    began = time.monotonic()
    with owned(tmp_path):
        assert record_of(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - began >= owner.WATCH_S
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_taken_over_while_it_stood_still_ends(start, tmp_path, quick):
    first = start(tmp_path, HOST="elsewhere", BOOT="another")
    answer(first)
    first.send_signal(signal.SIGSTOP)
    with owned(tmp_path):
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=20) == 1
        assert f"process {os.getpid()}" in first.stderr.read()
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_of_many_that_start_together_one_owns_the_folder(start, tmp_path):
    dead = start(tmp_path)
    answer(dead)
    dead.kill()
    processes = [start(tmp_path) for _ in range(6)]
    said = [answer(process)[0] for process in processes]
    (own,) = [number for number, line in enumerate(said) if line == "owns\n"]
    assert record_of(tmp_path)["pid"] == processes[own].pid


@pytest.mark.parametrize("content", ["", "{}", "3", '{"pid": 1, "x": 2}', '{"pid": 1'])
def test_a_file_that_names_no_process_is_nobodys(content, tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "CLAIM_S", 0.1)
    (tmp_path / ".running").write_text(content)
    with owned(tmp_path):
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_a_file_that_cannot_be_replaced_is_named_in_a_sentence(tmp_path):
    path = tmp_path / ".running"
    path.mkdir()
    with pytest.raises(UserError, match=str(path)), owned(tmp_path):
        pass
