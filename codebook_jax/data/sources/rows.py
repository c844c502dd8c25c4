"""Rows of tables, data sets and shards: the names of their parts (image, caption, id), and the
records made of them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.record import (
    NO_CAPTION,
    Record,
    Request,
    Source,
    WithoutCaption,
    checked,
)
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError, first_few, reason

_TEXTS = ("text", "caption", "raw", "sentence")  # keys of the text in captions stored as objects
_MOST_NAMES, _LONGEST_NAME = 10, 40  # in a message
USUAL = {  # names of parts, first match wins; not ids, which often number examples, not images
    "image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "captions", "text", "texts", "sentences", "sentence", "txt"),
    "id": (),
}
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"  # for example train, train[:50%]
_SPLIT = re.compile(rf":({_PART}(?:\+{_PART})*)$")


class Rows(Source):
    """Records made of rows that a subclass reads by index: the image of a record's first row, with
    the captions of all its rows.
    """

    _parts: Parts
    _count: int  # rows
    # The rows record by record, and where each record begins; None: each row is a record.
    _groups: tuple[np.ndarray, np.ndarray] | None = None
    _ids: np.ndarray | None = None  # of the records' images; None: each record has its own

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
        rows = self._members(index)
        return self._texts([self._row(row, "caption", is_needed=True) for row in rows])

    def name(self, index: int) -> str:
        return self._named(self._members(index)[0])

    def _members(self, index: int) -> Sequence[int]:
        index = int(checked(index, len(self)))
        if self._groups is None:
            return (index,)
        rows, first = self._groups
        return rows[first[index] : first[index + 1]].tolist()

    def _row(self, row: int, part: str, *, is_needed: bool = False) -> Mapping[str, Any]:
        """What `_read` returns; raises UserError if the run cannot go on without."""
        try:
            return self._read(row, part)
        except UserError:
            raise
        except Exception as failure:  # OSError, RuntimeError, Arrow's own, any parsing error
            own = isinstance(failure, UnreadableImage)
            wrong = f"{self._place(row)}: {failure if own else reason(failure)}"
            if is_needed:
                raise UserError(f"{wrong}: see that the files are there, then restart") from failure
            raise UnreadableImage(wrong) from failure

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        return texts_in([row[self._parts.caption] for row in rows])

    def _image_id(self, index: int, row: Mapping[str, Any]) -> int:
        return int(index if self._ids is None else self._ids[index])

    def _named(self, row: int) -> str:
        """The id of a row, or its place if it has none."""
        key = None
        with contextlib.suppress(UnreadableImage):
            key = self._parts.id and self._row(row, "id")[self._parts.id]
        if key is None:
            return self._place(row)
        return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


class Parts(NamedTuple):
    """The names of the parts in a row."""

    image: str
    caption: str
    id: str | None


def parts_of(
    what: str, request: Request, names: Sequence[str], usual: Mapping[str, Sequence], hint: str = ""
) -> Parts:
    """The parts that the options name, else the first of the `usual` names, if need be in another
    case; raises UserError, which ends with `hint`, if `names` lack one.
    """
    in_any_case, parts = {name.strip().lower(): name for name in reversed(names)}, {}
    exact = dict(zip(names, names, strict=True))
    for part, key in request.keys.items():
        wanted, found = f"{key!r} for ?{part}_key", key if key in names else None
        if key is None:
            wanted = f"{part} under a usual name ({', '.join(usual[part])})"
            known = ((held, name) for held in (exact, in_any_case) for name in usual[part])
            found = next((held[name] for held, name in known if name in held), None)
        if found is None and (key is not None or part != "id"):
            raise UserError(
                f"{what} has no {wanted}, it has {names_in(names)}: name one of these with "
                f"?{part}_key=NAME{hint}"
            )
        parts[part] = found
    return Parts(**parts)


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts with words in a text, a list of texts, or lists of objects with a text."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
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


def place_of(request: Request) -> tuple[str, str, str | None]:
    """(SCHEME:NAME, NAME, SPLIT) of a request for NAME:SPLIT; SPLIT is None if not given."""
    place = request.place
    found = None if os.path.isdir(place) else _SPLIT.search(place)
    place, split = (place, None) if found is None else (place[: found.start()], found[1])
    return f"{request.scheme}:{place}", place, split


def only_split(what: str, splits: Sequence[str]) -> str:
    """The only split of a data set; raises UserError if it has several."""
    if len(splits) != 1:
        raise UserError(f"{what} has the splits {names_in(splits)}: name one as {what}:SPLIT")
    return splits[0]


def nothing_in(what: str, part: str, name: str, feature: object) -> UserError:
    """The refusal of a part that holds no images, or no captions."""
    kind = str(feature).partition("\n")[0]
    return UserError(
        f"{what}: {name!r} is {kind} and holds no {part}s: name another part with "
        f"?{part}_key=NAME; paths of images are read with json: or csv:, and URLs are downloaded "
        "with img2dataset and read with webdataset:"
    )
