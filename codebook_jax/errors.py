"""The exception for user errors, and what several modules need to word and to recognise errors."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # of an OSError
UNREACHABLE = (errno.EROFS, errno.ESTALE, errno.EIO, errno.ETIMEDOUT)  # of a folder that is gone


class UserError(Exception):
    """One sentence: what was given, what is wrong, what to do. `main` prints it, exits with 2."""


def first_few(
    things: Sequence[object], most: int, *, between: str = ", ", last: str = " and"
) -> str:
    """The first `most` of these for a sentence, and how many more there are."""
    more = f"{last} {len(things) - most:,} more" if len(things) > most else ""
    return between.join(map(str, things[:most])) + more


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The end of a sentence about a misspelt name: the closest of `names`, if any is close."""
    # not at the top: this module is imported before Ctrl-C is caught, see console.py
    import difflib

    close = difflib.get_close_matches(given, list(names), n=1)
    return f" ... did you mean {close[0]}?" if close else ""
