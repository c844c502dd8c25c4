"""Where a command keeps the programs that XLA compiled for it, so that the next one reads them; and
the end of what compiling takes.

The place is JAX's own cache, set by the variables that JAX reads when it is imported: what a user
sets of them wins, and `import codebook_jax` changes nothing. JAX's names of the programs cover its
version, the devices and the features of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pwd
import sys
from pathlib import Path

import filelock

from codebook_jax.errors import UserError, reason

FOLDER, SWITCH = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
OFF = {"n", "no", "f", "false", "off", "0"}  # of SWITCH, as JAX reads it
LIMITS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(10**9),  # bytes; what was used longest ago goes first
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # those of a small model are fast together
}
PATIENCE_S = 10  # with another process that holds the lock, as JAX has


def environment(*, alone: bool) -> dict[str, str]:
    """What to set before JAX is imported.

    Nothing if the user has set it, or if the process is not `alone`: on a GPU, those of a run that
    find a program would not take part in tuning it with those that do not. Raises UserError if the
    folder that the user named cannot be made.
    """
    given = os.environ
    if given.get(SWITCH, "").lower() in OFF:
        return {}
    if FOLDER in given:
        _make(given[FOLDER])
        return {}
    if not alone:
        return {}
    try:
        folder = _folder()
        _prepare(folder)
    except (OSError, RuntimeError, KeyError) as error:
        why = f"{FOLDER}=DIR names another place, {SWITCH}=false keeps none"
        print(f"compiled programs are not kept ({reason(error)}): {why}", file=sys.stderr)
        return {}
    return {name: value for name, value in LIMITS.items() if name not in given} | {
        FOLDER: str(folder)
    }


def _make(named: str) -> None:
    try:
        if named and "://" not in named:
            os.makedirs(named, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{FOLDER}={named} cannot be made ({error.strerror}): name a folder or unset it"
        ) from error


def _folder() -> Path:
    """The user's folder for caches (XDG Base Directory); a relative one is ignored."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "codebook_jax" / "xla"


def _prepare(folder: Path) -> None:
    """Makes the folder, and removes programs of which a process was killed while it wrote them: JAX
    would neither read them nor write them again. Raises OSError, RuntimeError or KeyError if it
    cannot.
    """
    pwd.getpwuid(os.getuid())  # jax 0.10 looks up who owns a file, and fails for an unknown user
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write it can run code here
    with filelock.FileLock(folder / ".lockfile", timeout=PATIENCE_S):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink()


def release() -> None:
    """Gives back to the system what compiling took and nothing uses; for `base` 0.6 GB or more."""
    gc.collect()  # a program that was used once is part of a cycle
    with contextlib.suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
