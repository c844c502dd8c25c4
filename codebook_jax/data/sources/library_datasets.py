"""Shared by the data sets of other libraries: NAME:SPLIT, and the names of the parts of an
example.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codebook_jax.data.sources.listed import keys_of
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

USUAL = {  # names of parts, first match wins; not ids, which often number examples, not images
    "image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "captions", "text", "texts", "sentences", "sentence", "txt"),
}
_TEXTS = ("text", "caption", "raw", "sentence")  # keys of the text in captions stored as objects
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"  # for example train, train[:50%]
_SPLIT = re.compile(rf":({_PART}(?:\+{_PART})*)$")


def place_and_split(place: str) -> tuple[str, str | None]:
    """(NAME, SPLIT) of NAME:SPLIT; SPLIT is None if not given."""
    found = None if os.path.isdir(place) else _SPLIT.search(place)
    return (place, None) if found is None else (place[: found.start()], found[1])


def only_split(what: str, splits: Sequence[str]) -> str:
    """The split of a data set that has exactly one; else raises UserError asking to name one."""
    if len(splits) == 1:
        return splits[0]
    raise UserError(
        f"{what} has the splits {keys_of(splits)}: name one, for example {what}:{splits[0]}"
        if splits
        else f"{what} has no splits: give a data set that holds examples"
    )


def chosen_part(what: str, part: str, given: str | None, names: Sequence[str]) -> str:
    """The name, `given` or usual, of a `part` of an example; raises UserError if there is none."""
    held = f"it has {keys_of(names)}"
    if given is not None and given not in names:
        raise UserError(f"{what} has no {given!r} for ?{part}_key ({held}): name one of them")
    found = given or next((name for name in USUAL[part] if name in names), None)
    if found is None:
        usual = ", ".join(USUAL[part])
        raise UserError(
            f"{what} has no {part} under a usual name ({usual}; {held}): name it with "
            f"?{part}_key=NAME"
        )
    return found


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts with words in a text, a list of texts, or lists of objects with a text; anything
    else is left out.

    Bytes that are not UTF-8 do not count as text.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return ()
    if isinstance(value, str):
        return (value.strip(),) if has_words(value) else ()
    if isinstance(value, Mapping):
        return texts_in(next((value[name] for name in _TEXTS if name in value), None))
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(text for part in value for text in texts_in(part))
    return ()


def first_line(failure: BaseException) -> str:
    """The first line of a library's error message."""
    lines = str(failure).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(failure).__name__
