"""Packing that is interrupted, restarted or finds damage ends with the same files as an undisturbed
one.
"""

import errno
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_packing import content, pack, write_kinds, write_many
from small_run import ROOT

from codebook_jax.data import packing
from codebook_jax.data.manifest import verify
from codebook_jax.errors import UserError

WAIT_S = 30  # limit for what takes a second on an idle machine


class Server:
    """The packing program, in its own process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "small_packing.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            self.lines.put(line)

    def start(self, source, workdir, **changes):
        """The process id of a packing that has begun."""
        asked = {"path": str(source), "workdir": str(workdir), **changes}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        pid = int(self.until("forked ").split()[1])
        self.until("packing ")
        return pid

    def until(self, words):
        """The first line of output with these words."""
        heard = []
        while not heard or words not in heard[-1]:
            try:
                heard.append(self.lines.get(timeout=WAIT_S))
            except queue.Empty:
                raise AssertionError(f"{words!r} is not in {heard}") from None
        return heard[-1]


@pytest.fixture(scope="module")
def server():
    running = Server()
    yield running
    running.process.stdin.close()
    assert running.process.wait(timeout=20) == 0


def wait_for(condition, what):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.02)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_bytes_of_a_packing_left_alone(
    server, tmp_path
):
    source = write_many(tmp_path / "pictures", 100)
    (tmp_path / "pictures" / "31.jpg").write_bytes(b"")
    assert pack(source, tmp_path / "alone") == 0
    workdir, chance = tmp_path / "killed", random.Random(0)

    def packed():
        return len(list((workdir / ".progress").glob("0*.json")))

    finished = []
    for kill in range(10):
        several = {"seconds": 0.1, "processes": 2} if kill == 5 else {"seconds": 0.05}
        pid = server.start(source, workdir, **several)
        wait_for(lambda: list(workdir.glob(".*.tmp")), "a shard that is written")
        time.sleep(chance.uniform(0.0, 0.4))
        if kill % 3 == 2:
            wait_for(lambda: packed() > finished[-1], "another shard")
        if kill == 5:  # the first process alone: those it has started must not outlive it
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
        wait_for(lambda group=pid: group_is_gone(group), "the end of a killed packing")
        finished.append(packed())
        assert not (workdir / "manifest.json").exists()
    assert finished == sorted(finished) and 2 < finished[-1] < 25
    server.start(source, workdir, seconds=0, processes=2)
    server.until("packed 99 of 100 listed pairs")
    wait_for(lambda: not (workdir / ".running").exists(), "the end")
    assert content(workdir) == content(tmp_path / "alone")


def test_a_signal_ends_it_with_a_sentence_and_leaves_no_process_and_no_half_shard(server, tmp_path):
    source = write_many(tmp_path / "pictures", 40)
    workdir = tmp_path / "packed"
    pid = server.start(source, workdir, seconds=0.1, processes=2)
    wait_for(lambda: list((workdir / ".progress").glob("0*.json")), "a shard")
    with pytest.raises(UserError, match="--workdir=.* is in use by process"):
        pack(source, workdir)
    os.killpg(pid, signal.SIGTERM)
    said = server.until("stopped by SIGTERM")
    assert "packed; the same command" in said
    wait_for(lambda: group_is_gone(pid), "the end")
    assert [path.name for path in workdir.glob(".*")] == [".progress"]
    names = {path.name for path in (workdir / ".progress").iterdir()}
    packed = {name for name in names if name.startswith("0")}
    assert packed and names == packed | {"plan.json"}


def test_a_killed_worker_ends_the_packing_with_a_sentence(server, tmp_path):
    source = write_many(tmp_path / "pictures", 40)
    pid = server.start(source, tmp_path / "packed", seconds=0.1, processes=2)
    wait_for(lambda: list((tmp_path / "packed").glob(".*.tmp")), "a worker that packs")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    workers = [int(child) for child, command in commands.items() if b"spawn_main" in command]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    said = server.until("UserError")
    assert "killed" in said and "--config.prepare.processes=1" in said
    wait_for(lambda: group_is_gone(pid), "the end of the other worker")


def stop_in_the_second_shard(monkeypatch):
    """Sends SIGTERM at the third picture of the second shard."""
    real = packing.packed_picture

    def stopping(image, *options):
        if image.endswith("/6.jpg"):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(image, *options)

    monkeypatch.setattr(packing, "packed_picture", stopping)


def test_another_source_or_other_options_are_refused_by_name(tmp_path, monkeypatch, capsys):
    source, workdir = write_many(tmp_path / "pictures", 12), tmp_path / "packed"
    stop_in_the_second_shard(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    assert pack(source, workdir) == 143 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.startswith("stopped by SIGTERM: 1 shard packed; ")
    monkeypatch.undo()
    other = tmp_path / "pictures" / "other.json"
    other.write_text(json.dumps(json.loads(source.read_text())[1:]))
    changed = tmp_path / "pictures" / "changed.json"
    changed.write_text(source.read_text().replace("picture 3", "photo 3"))
    for finished in (False, True):
        if finished:
            assert pack(source, workdir, processes=2) == 0  # changes nothing, so it may change
            assert "1 of 3 shards are packed already" in capsys.readouterr().out
        for path, changes, words in (
            (source, {"side_px": 40, "quality": 90}, "side_px=48, now 40; .*quality=95, now 90"),
            (source, {"role": "test"}, 'config.prepare.role="train", now "test"'),
            (other, {}, r"json\('pairs.json', images=12\), now json\('other.json', images=11"),
            (changed, {}, "images=12.* with other content"),
        ):
            with pytest.raises(UserError, match=words):
                pack(path, workdir, **changes)


def test_pictures_found_at_another_place_are_read_again(tmp_path, monkeypatch):
    source = write_many(tmp_path / "pictures", 12)
    (tmp_path / "half").mkdir()
    for number in range(1, 6):
        (tmp_path / "half" / f"{number}.jpg").hardlink_to(tmp_path / "pictures" / f"{number}.jpg")
    stop_in_the_second_shard(monkeypatch)
    assert pack(source, tmp_path / "packed", **{"data.image_root": str(tmp_path / "half")}) == 143
    monkeypatch.undo()
    assert pack(source, tmp_path / "packed", **{"data.image_root": str(tmp_path / "pictures")}) == 0
    assert pack(source, tmp_path / "alone") == 0
    assert content(tmp_path / "packed") == content(tmp_path / "alone")
    assert json.loads((tmp_path / "packed" / "manifest.json").read_text())["records"] == 12


def test_a_source_of_which_nothing_can_be_read_leaves_nothing(tmp_path):
    source = write_many(tmp_path / "pictures", 5)
    words = "none of 5 pictures could be read .first: 0.jpg: No such file"
    with pytest.raises(UserError, match=words):
        pack(source, tmp_path / "packed", **{"data.image_root": str(tmp_path)})
    assert list((tmp_path / "packed").iterdir()) == []
    assert pack(source, tmp_path / "packed") == 0


def test_a_finished_folder_is_verified_and_what_is_damaged_is_made_again(tmp_path, capsys):
    path, finished = write_kinds(tmp_path / "pictures"), tmp_path / "finished"
    assert pack(path, finished) == 0
    capsys.readouterr()
    whole = content(finished)
    workdir = shutil.copytree(finished, tmp_path / "packed")
    assert pack(path, workdir) == 0
    assert "already complete" in (said := capsys.readouterr().out) and "packed 10 of 17" in said
    shard, index = "pairs-00001-of-00004.array_record", "pairs-00003-of-00004.jsonl"
    flipped = bytearray(whole[shard])
    flipped[len(flipped) // 2] ^= 1
    (workdir / shard).write_bytes(flipped)
    (workdir / index).unlink()
    (workdir / "skipped.tsv").write_text("nothing\tat all\n")
    why = dict(verify(workdir))
    assert list(why) == [shard, index, "skipped.tsv"]
    assert all(name in reason for name, reason in why.items())
    assert why[index] == f"{index} is missing" and "sha256" in why[shard]
    assert pack(path, workdir) == 0
    said = capsys.readouterr().out
    for sentence in why.values():
        assert f"{sentence}: remade\n" in said
    assert content(workdir) == whole


def test_a_damaged_shard_is_packed_from_the_pictures_of_now(tmp_path, capsys):
    path, workdir = write_many(tmp_path / "pictures", 12), tmp_path / "packed"
    assert pack(path, workdir) == 0
    whole = content(workdir)
    shard = "pairs-00001-of-00003.array_record"
    (workdir / shard).write_bytes(whole[shard][:1000])
    (tmp_path / "pictures" / "5.jpg").unlink()
    assert pack(path, workdir) == 0
    said = capsys.readouterr().out
    assert f"{shard} has 1,000 bytes instead of {len(whole[shard]):,}: remade" in said
    made = content(workdir)
    touched = {name for name in made if made[name] != whole[name]}
    index = shard.replace(".array_record", ".jsonl")
    assert touched == {shard, index, "manifest.json", "skipped.tsv"}
    assert made["skipped.tsv"] == b"5.jpg\tNo such file or directory\n"
    assert verify(workdir) == []


@pytest.mark.parametrize("how", ["OSError", "RuntimeError"])
def test_a_full_disk_is_a_sentence_and_leaves_no_half_shard(tmp_path, monkeypatch, how):
    source = write_many(tmp_path / "pictures", 8)

    def full(*_, **__):
        if how == "OSError":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("write() failed: No space left on device; writing a; at byte 2097152")

    monkeypatch.setattr(packing.msgpack, "packb", full)
    with pytest.raises(UserError, match="no space left .* to .* same command again"):
        pack(source, tmp_path / "packed")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {".progress"}
    monkeypatch.undo()
    assert pack(source, tmp_path / "packed") == 0
