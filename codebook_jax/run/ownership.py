"""One writer at a time in a folder, on this machine or another: `with owned(folder)`.

A hidden file in the folder names its owner. On one machine the process number decides, which a
killed owner does not keep. An owner elsewhere is alive if the beat in the file changes: no clocks
are compared, and the file system need not have locks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from codebook_jax.errors import UNREACHABLE, UserError
from codebook_jax.files import parse_json, refused, written_whole
from codebook_jax.parallel.processes.joining import end

FILE = ".running"
BEAT_S = 5.0
WATCH_S = 30.0  # an owner without a beat for this long is gone; nothing blocks all threads as long
CLAIM_S = 2.0  # the most that a process needs between reading the file and writing its own name


class Owner(NamedTuple):
    """The contents of the file."""

    host: str
    pid: int
    since: str  # only for people to read, like the next
    command: str
    boot: str  # of the kernel; empty if there is no /proc, like the next two
    pid_namespace: str
    started: str  # since the boot; differs for another process with the same number
    token: str
    beat: str = "0" * 9  # of fixed length, so that no reader sees a partial file

    @property
    def machine(self) -> tuple[str, ...]:
        return self.host, self.boot, self.pid_namespace

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def owned(folder: Path, name: str = FILE) -> Iterator[None]:
    """Keeps other processes from owning the folder; raises UserError naming the one that does.

    The file is removed on leaving. If another process takes over meanwhile, because this one or its
    disk stood still for `WATCH_S`, this process exits at once.
    """
    path, own = folder / name, _this_process()
    with refused(path, *UNREACHABLE):
        folder.mkdir(parents=True, exist_ok=True)
        _claim(path, own)
    left = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, own, left), daemon=True)
    beating.start()
    try:
        yield
    finally:
        left.set()
        beating.join(BEAT_S)  # it may be stuck on a hanging disk
        if _is(_read(path), own):
            with contextlib.suppress(OSError):  # the next process sees that this one is gone
                path.unlink()


def _claim(path: Path, own: Owner) -> None:
    """Writes this process's name to `path`; raises UserError if another process owns it."""
    while True:
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            _write(file.fileno(), own)
            return
        owner = _read(path)
        if owner is None:
            time.sleep(CLAIM_S)  # it may be writing its name just now, or have left
        elif _is_alive(path, owner):
            raise UserError(
                f"--workdir={path.parent} is in use by {owner} since {owner.since}: wait for it, "
                "end it, or give another folder"
            )
        if os.path.lexists(path) and _is(_read(path), owner):
            with written_whole(path) as file:
                file.write(json.dumps(own._asdict()))
            time.sleep(CLAIM_S)  # of several that take over, the last to write wins
            if _is(_read(path), own):
                return


def _beat(path: Path, own: Owner, left: threading.Event) -> None:
    for beat in itertools.count(1):
        if left.wait(BEAT_S):
            return
        owner = _read(path)
        if owner is not None and not _is(owner, own) and not left.is_set():
            why = f"since this one stood still for {WATCH_S:.0f} s: the run continues there"
            end(f"{owner} has taken over --workdir={path.parent}, {why}", 1)
        # Opened by its name: a mounted bucket loses what is written to a renamed file. Whoever
        # writes the results reports a disk that is full or gone.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            _write(file.fileno(), own._replace(beat=f"{beat:09}"))


def _is_alive(path: Path, owner: Owner) -> bool:
    """Whether the owner is a running process of this machine, or its beat moves elsewhere."""
    if owner.machine == _this_process().machine:
        return _runs(owner)
    watching = f"watching for {WATCH_S:.0f} s whether it is still alive"
    print(f"--workdir={path.parent} was in use by {owner}: {watching}", flush=True)
    last = time.monotonic() + WATCH_S
    while time.monotonic() < last:
        time.sleep(min(0.5, WATCH_S / 10))
        os.listdir(path.parent)  # makes a network file system ask its server
        now = _read(path)
        if now is None and path.exists():  # a network file system may show a partial file
            continue
        if not _is(now, owner):
            return False
        if now.beat != owner.beat:
            return True
    return False


def _runs(owner: Owner) -> bool:
    """Whether a process of this machine is running; a zombie is not."""
    with contextlib.suppress(OSError):
        state, started = _status(owner.pid)
        return state not in "ZX" and started == owner.started
    try:
        os.kill(owner.pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's, which /proc may hide
    return True


def _status(pid: int) -> tuple[str, str]:
    """(state, start in ticks since the boot) of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _this_process() -> Owner:
    boot = namespace = started = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        _, started = _status(os.getpid())
    return Owner(
        host=platform.node(),
        pid=os.getpid(),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=shlex.join(sys.orig_argv),
        boot=boot,
        pid_namespace=namespace,
        started=started,
        token=secrets.token_hex(8),
    )


def _is(one: Owner | None, other: Owner | None) -> bool:
    return (one and one.token) == (other and other.token)


def _read(path: Path) -> Owner | None:
    """The contents of the file; None if it is missing or unusable."""
    try:
        return Owner(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write(descriptor: int, owner: Owner) -> None:
    os.pwrite(descriptor, json.dumps(owner._asdict()).encode(), 0)
    os.fsync(descriptor)
