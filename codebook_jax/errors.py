"""The exception for user errors, and what several modules need to word and to recognise errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # of an OSError
UNREACHABLE = (errno.EROFS, errno.ESTALE, errno.EIO, errno.ETIMEDOUT)  # of a folder that is gone
_LONGEST_REASON = 160  # characters


class UserError(Exception):
    """A user error in one sentence: what was given, what is wrong, what to do. `main` prints it and
    exits with 2.
    """


def first_few(
    things: Sequence[object], most: int, *, between: str = ", ", last: str = " and"
) -> str:
    """The first `most` of these for a sentence, and how many more there are."""
    more = f"{last} {len(things) - most:,} more" if len(things) > most else ""
    return between.join(map(str, things[:most])) + more


def reason(failure: BaseException) -> str:
    """The kind and first line of a library's error, short; a full disk by its name."""
    text = str(failure).strip()
    for full in map(os.strerror, FULL_DISK):
        if full in text:
            return full
    line = text.partition("\n")[0].partition(" See full TensorStore details")[0].rstrip(".")
    line = line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
    return f"{type(failure).__name__}: {line}" if line else type(failure).__name__


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The end of a sentence about a misspelt name: the closest of `names`, if any is close."""
    # not at the top: this module is imported before Ctrl-C is caught, see console.py
    import difflib

    close = difflib.get_close_matches(given, list(names), n=1)
    return f" ... did you mean {close[0]}?" if close else ""
