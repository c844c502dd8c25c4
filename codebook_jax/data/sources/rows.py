"""Rows of lists, tables, data sets and shards: the names of their parts (image, caption, id), the
values, and the records made of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.listed import Entry
from codebook_jax.data.sources.record import (
    NO_CAPTION,
    Record,
    Request,
    Source,
    WithoutCaption,
    checked,
)
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError, first_few

KINDS = {"a text": str, "the path of an image": str, "an id": int | str, "a list": list}
_TEXTS = ("text", "caption", "raw", "sentence")  # keys of the text in captions stored as objects
_MOST_NAMES, _LONGEST_NAME = 10, 40  # in a message


class Rows(Source):
    """Records made of rows that a subclass reads by index.

    `groups` holds, for records of several rows, the rows record by record and where each record
    begins: it has the image of its first row and the captions of all. None: each row is a record.
    """

    _parts: Parts
    _count: int  # rows
    _groups: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count if self._groups is None else len(self._groups[1]) - 1

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        """A row with at least this part: the "image", with the caption, the "caption" or the "id";
        any error but UserError is one of the picture.
        """

    def _place(self, row: int) -> str:
        """Where a row is, for messages."""

    def __getitem__(self, index: int) -> Record:
        rows = self._members(index)
        row = self._row(rows[0], "image")
        image = row[self._parts.image]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if image is None or not len(image):
            raise UnreadableImage(f"{self._place(rows[0])}: the image is empty")
        captions = self._texts([row, *(self._row(other, "caption") for other in rows[1:])])
        if not captions:
            raise WithoutCaption(f"{self._place(rows[0])} {NO_CAPTION}")
        return Record(image, captions, self._image_id(index, row))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._texts([self._row(row, "caption") for row in self._members(index)])

    def name(self, index: int) -> str:
        return self._named(self._members(index)[0])

    def _members(self, index: int) -> Sequence[int]:
        index = int(checked(index, len(self)))
        if self._groups is None:
            return (index,)
        rows, first = self._groups
        return rows[first[index] : first[index + 1]].tolist()

    def _row(self, row: int, part: str) -> Mapping[str, Any]:
        try:
            return self._read(row, part)
        except UserError:
            raise
        except Exception as failure:  # OSError, RuntimeError, Arrow's own, any parsing error
            raise UnreadableImage(f"{self._place(row)}: {first_line(failure)}") from failure

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        return texts_in([row[self._parts.caption] for row in rows])

    def _image_id(self, index: int, row: Mapping[str, Any]) -> int:
        return int(index)

    def _named(self, row: int) -> str:
        """The id of a row, or its place if it has none."""
        key = None
        with contextlib.suppress(UnreadableImage):
            key = self._parts.id and self._row(row, "id")[self._parts.id]
        if key is None:
            return self._place(row)
        return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Raises UserError where a record must be readable, as when captions are read at start."""
    try:
        yield
    except UnreadableImage as failure:
        raise UserError(f"{failure}: see that the files are there, then start again") from failure


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


def first_line(message: object) -> str:
    """The first line of a library's error message or description."""
    lines = str(message).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(message).__name__
