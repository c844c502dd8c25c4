"""Checks that all processes see the same workdir: otherwise Orbax would wait for files that never
appear.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from codebook_jax.errors import UserError
from codebook_jax.parallel.processes.peers import Peers

SEEN_S = 15.0  # how long a network file system may take to show a new file


def check(others: Peers, folder: Path) -> None:
    """Raises UserError naming the process that cannot write the folder or does not see the file
    that process 0 writes there.
    """
    if others.count == 1:
        return
    mark = folder / f".start-{others.exchange('workdir token', secrets.token_hex(8))[0]}"
    own = mark.with_name(f"{mark.name}-{others.own}") if others.own else mark
    problem = _write(own) if own == mark else ""
    problems = others.exchange("workdir marked", problem)
    if own != mark and not any(problems):
        problem = _write(own) if _is_seen(mark) else "does not see the file that process 0 wrote"
    problems = others.exchange("workdir", problem)
    with contextlib.suppress(OSError):
        own.unlink()
    for process, problem in enumerate(problems):
        if problem:
            raise UserError(
                f"--workdir={folder} is not one folder for all processes: {others.name(process)} "
                f"{problem}: give a folder that every host mounts and can write to, such as NFS, "
                "Lustre or a mounted bucket"
            )


def _write(file: Path) -> str:
    """Writes an empty file; returns what went wrong, or an empty string."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _is_seen(file: Path) -> bool:
    """Whether a file exists or appears within SEEN_S."""
    until = time.monotonic() + SEEN_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if file.name in os.listdir(file.parent):  # makes NFS ask its server
                return True
        time.sleep(0.2)
    return False
