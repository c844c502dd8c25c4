"""Shared by the data sets of other libraries: NAME:SPLIT, and the parts of an example."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources.listed import keys_of
from codebook_jax.data.sources.record import Request
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

USUAL = {  # names of parts, first match wins; not ids, which often number examples, not images
    "image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "captions", "text", "texts", "sentences", "sentence", "txt"),
}
_TEXTS = ("text", "caption", "raw", "sentence")  # keys of the text in captions stored as objects
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"  # for example train, train[:50%]
_SPLIT = re.compile(rf":({_PART}(?:\+{_PART})*)$")


class Parts(NamedTuple):
    """The names of the parts of an example, or of a table's columns."""

    image: str
    caption: str
    id: str | None


def place_of(request: Request) -> tuple[str, str, str | None]:
    """(SCHEME:NAME, NAME, SPLIT) of a request for NAME:SPLIT; SPLIT is None if not given. Raises
    UserError for a NAME that can only be a folder, and does not exist.
    """
    place = request.place
    found = None if os.path.isdir(place) else _SPLIT.search(place)
    place, split = (place, None) if found is None else (place[: found.start()], found[1])
    what = f"{request.scheme}:{place}"
    if place.startswith(("/", ".", "~")) and not os.path.exists(place):
        cure = "give a folder, or a data set's name"
        raise UserError(f"{what}: the folder does not exist: {cure}")
    return what, place, split


def only_split(what: str, splits: Sequence[str]) -> str:
    """The only split of a data set; raises UserError if it has several."""
    if len(splits) == 1:
        return splits[0]
    example = f"{what}:{splits[0] if splits else 'train'}"
    raise UserError(f"{what} has the splits {keys_of(splits)}: name one, for example {example}")


def parts_of(what: str, request: Request, names: Sequence[str]) -> Parts:
    """The parts that the options name, else those with usual names."""
    held, parts = f"it has {keys_of(names)}", {}
    for part, key in request.keys.items():
        if key is not None and key not in names:
            raise UserError(f"{what} has no {key!r} for ?{part}_key ({held}): name one of them")
        usual = USUAL.get(part, ())
        parts[part] = key or next((name for name in usual if name in names), None)
        if parts[part] is None and usual:
            raise UserError(
                f"{what} has no {part} under a usual name ({', '.join(usual)}; {held}): name it "
                f"with ?{part}_key=NAME"
            )
    return Parts(**parts)


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts with words in a text, a list of texts, or lists of objects with a text."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:  # as anything else that is not a text
            return ()
    if isinstance(value, str):
        return (value.strip(),) if has_words(value) else ()
    if isinstance(value, Mapping):
        return texts_in(next((value[name] for name in _TEXTS if name in value), None))
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(text for part in value for text in texts_in(part))
    return ()


def nothing_in(what: str, part: str, name: str, feature: object) -> UserError:
    """The refusal of a part that holds no images, or no captions."""
    others = (
        "; paths are read with json: or csv:, and URLs are downloaded with img2dataset and read "
        "with webdataset:"
    )
    return UserError(
        f"{what}: {name!r} is {first_line(feature)} and holds no {part}s: name another part with "
        f"?{part}_key=NAME{others * (part == 'image')}"
    )


def first_line(message: object) -> str:
    """The first line of a library's error message or description."""
    lines = str(message).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(message).__name__
