"""Checks that all processes see the same workdir: otherwise Orbax would wait for files that never
appear.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes.peers import Peers

SEEN_S = 15.0  # how long a network file system may take to show a new file


def check(others: Peers, folder: Path) -> None:
    """Raises UserError naming the process that cannot write the folder or sees a different one than
    process 0.

    Process 0 writes a token, every other process looks for it and writes its own, and process 0
    looks for them all.
    """
    if others.count == 1:
        return
    marks = Path(folder) / f".start-{others.exchange('workdir token', secrets.token_hex(8))[0]}"
    problem = _write(marks, others.own) if others.own == 0 else ""
    others.exchange("workdir token written", None)
    if others.own != 0:
        unseen = "does not see the file that process 0 wrote"
        problem = _write(marks, others.own) if _seen(marks / "0") else unseen
    problems = others.exchange("workdir token seen", problem)
    if others.own == 0:
        for process, known in enumerate(problems):
            if not known and not _seen(marks / str(process)):
                problems[process] = "wrote a file that process 0 does not see"
        shutil.rmtree(marks, ignore_errors=True)
    for process, problem in enumerate(others.exchange("workdir", problems)[0]):
        if problem:
            raise UserError(
                f"--workdir={folder} is not one folder for all processes: {others.name(process)} "
                f"{problem}: give a folder that every host mounts and can write to, such as NFS, "
                "Lustre or a mounted bucket"
            )


def _write(marks: Path, own: int) -> str:
    """Writes this process's token; returns what went wrong, or an empty string."""
    try:
        marks.mkdir(parents=True, exist_ok=True)
        (marks / str(own)).write_text("")
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _seen(path: Path) -> bool:
    """Whether a file exists or appears within SEEN_S."""
    end = time.monotonic() + SEEN_S
    while True:
        try:
            if path.name in os.listdir(path.parent):  # makes NFS ask its server
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
