"""The parts of a pair (image, caption, id) in a row of a list, a table or a data set: their names
and their values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources.listed import Entry
from codebook_jax.data.sources.record import Request
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError, first_few

KINDS = {"a text": str, "the path of an image": str, "an id": int | str, "a list": list}
_TEXTS = ("text", "caption", "raw", "sentence")  # keys of the text in captions stored as objects
_MOST_NAMES, _LONGEST_NAME = 10, 40  # in a message


class Parts(NamedTuple):
    """The names of the parts in a row."""

    image: str
    caption: str
    id: str | None


def parts_of(
    what: str,
    request: Request,
    names: Sequence[str],
    usual: Mapping[str, Sequence[str]],
    hint: str = "",
) -> Parts:
    """The parts that the options name, else the first of the `usual` names, in any case; raises
    UserError, which ends with `hint`, if `names` lack one.
    """
    known, parts = {name.strip().lower(): name for name in reversed(names)}, {}
    for part, key in request.keys.items():
        wanted = f"{key!r} for ?{part}_key"
        found = key if key in names else None
        if key is None:
            wanted = f"{part} under a usual name ({', '.join(usual.get(part, ()))})"
            found = next((known[name] for name in usual.get(part, ()) if name in known), None)
        if found is None and (key is not None or part != "id"):
            raise UserError(
                f"{what} has no {wanted}, it has {names_in(names)}: name one of these with "
                f"?{part}_key=NAME{hint}"
            )
        parts[part] = found
    return Parts(**parts)


def pair_in(where: str, row: Any, parts: Parts) -> Entry:
    """The pair in a row of a list; raises UserError, naming the row at `where`, if it is none."""
    cure = (
        "name the key of paths with ?image_key=NAME; COCO's caption files are read with coco:, "
        "Karpathy's splits with karpathy:, Visual Genome with vg:"
    )
    image = field(where, row, parts.image, "the path of an image", cure)
    cure = "name the key of captions with ?caption_key=NAME"
    captions, key = captions_in(where, row, parts.caption, cure), None
    if row.get(parts.id) not in (None, ""):
        key = field(where, row, parts.id, "an id", "use a whole number or a text")
    return Entry(where, image, captions, key)


def field(where: str, row: Any, key: str, kind: str = "", cure: str = "correct it") -> Any:
    """The value at a key of a row; raises UserError if there is none of this kind in KINDS."""
    if not isinstance(row, dict) or key not in row:
        held = f"its keys: {names_in(row)}" if isinstance(row, dict) else f"it is {shown(row)}"
        raise UserError(f'{where} has no key "{key}" ({held}): {cure}')
    value = row[key]
    wrong = isinstance(value, bool) or value == "" or not isinstance(value, KINDS.get(kind, object))
    if kind and wrong:
        raise UserError(f'{where}, key "{key}": {shown(value)} is not {kind}: {cure}')
    return value


def captions_in(
    where: str, row: Any, key: str, cure: str = "give a text, or a list of texts"
) -> tuple[str, ...]:
    """The texts with words in the text, or list of texts, at a key of a row; raises UserError for
    anything else.
    """
    captions = field(where, row, key, cure=cure)
    texts = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        value = f'{where}, key "{key}": {shown(captions)}'
        raise UserError(f"{value} is neither a text nor a list of texts: {cure}")
    return tuple(filter(has_words, texts))


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


def names_in(row: Iterable[str]) -> str:
    """The keys of a row, or the names of columns, for messages."""
    return first_few([str(name)[:_LONGEST_NAME] for name in row], _MOST_NAMES) or "none"


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
