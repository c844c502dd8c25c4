"""The one exception for what a user can mend, and what several modules refuse or recognise alike."""

from __future__ import annotations

import errno
from collections.abc import Iterable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # of an OSError
UNREACHABLE = (errno.EROFS, errno.ESTALE, errno.EIO, errno.ETIMEDOUT)  # a folder that is gone


class UserError(Exception):
    """A user's mistake in one sentence: what was given, what is wrong, what to do. `main` prints it and exits 2."""


def refuse_below(field: str, value: float, least: float) -> None:
    """Raises UserError where a field of the config, by its dotted name, is below the least it can be."""
    if value < least:
        raise UserError(f"config.{field}={value} is too small: give at least {least}")


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The end of a sentence about a misspelt name: the nearest of `names`; empty where none is near."""
    import difflib  # not above: this module is imported before Ctrl-C is caught, see console.py

    close = difflib.get_close_matches(given, list(names), n=1)
    return f" ... did you mean {close[0]}?" if close else ""
