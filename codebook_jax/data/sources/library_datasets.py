"""Shared by the data sets of other libraries: NAME:SPLIT, and rows read by index as records."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.parts import Parts, names_in, texts_in
from codebook_jax.data.sources.record import (
    NO_CAPTION,
    PARTS,
    Record,
    Request,
    Source,
    WithoutCaption,
    checked,
    required,
)
from codebook_jax.errors import UserError

USUAL = {  # names of parts, first match wins; not ids, which often number examples, not images
    "image": ("image", "img", "jpg", "jpeg", "png", "webp"),
    "caption": ("caption", "captions", "text", "texts", "sentences", "sentence", "txt"),
}
_PART = r"[A-Za-z_][\w.-]*(?:\[[^\]]*\])?"  # for example train, train[:50%]
_SPLIT = re.compile(rf":({_PART}(?:\+{_PART})*)$")


class Rows(Source):
    """The rows of a data set, by default each a record and an image of its own.

    Record i is `rows[first[i]:first[i + 1]]`: the image of the first, the captions of all.
    """

    called = "{}[{}]"  # the name of a row of a data set

    def __init__(self, what: str, parts: Parts, data: Sequence[Mapping[str, Any]]) -> None:
        self.form, _, self.place = what.partition(":")
        self._what, self._parts, self.listed, self.left_out = what, parts, len(data), ()
        self._data = dict.fromkeys(PARTS, data)  # where to read each part, the image with a caption
        self._rows = self._first = self._ids = np.arange(self.listed + 1)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Record:
        rows = self._members(index)
        row = self._read("image", rows[0])
        image = row[self._parts.image]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if image is None or not len(image):
            raise UnreadableImage(f"{self._place(rows[0])}: the image is empty")
        captions = self._texts([row, *(self._read("caption", other) for other in rows[1:])])
        if not captions:
            raise WithoutCaption(f"{self._place(rows[0])} {NO_CAPTION}")
        return Record(image, captions, int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._texts([self._read("caption", row) for row in self._members(index)])

    def name(self, index: int) -> str:
        return self._named(self._members(index)[0])

    def _members(self, index: int) -> list[int]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return self._rows[first:stop].tolist()

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        return texts_in([row[self._parts.caption] for row in rows])

    def _place(self, row: int) -> str:
        return self.called.format(self._what, row)

    def _named(self, row: int) -> str:
        """The id of a row, or its place if it has none."""
        key = None
        with contextlib.suppress(UnreadableImage):
            key = self._parts.id and self._read("id", row)[self._parts.id]
        if key is None:
            return self._place(row)
        return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)

    def _read(self, part: str, row: int) -> Mapping[str, Any]:
        try:
            return self._data[part][row]
        except Exception as failure:  # OSError, RuntimeError, Arrow's own, any parsing error
            raise UnreadableImage(f"{self._place(row)}: {first_line(failure)}") from failure


def place_of(request: Request) -> tuple[str, str, str | None]:
    """(SCHEME:NAME, NAME, SPLIT) of a request for NAME:SPLIT; SPLIT is None if not given. Raises
    UserError for a NAME that can only be a folder, and does not exist.
    """
    place = request.place
    found = None if os.path.isdir(place) else _SPLIT.search(place)
    place, split = (place, None) if found is None else (place[: found.start()], found[1])
    what = f"{request.scheme}:{place}"
    if place.startswith(("/", ".", "~")) and not os.path.exists(place):
        raise UserError(f"{what}: the folder does not exist: give a folder, or a data set's name")
    return what, place, split


def only_split(what: str, splits: Sequence[str]) -> str:
    """The only split of a data set; raises UserError if it has several."""
    if len(splits) == 1:
        return splits[0]
    example = f"{what}:{splits[0] if splits else 'train'}"
    raise UserError(f"{what} has the splits {names_in(splits)}: name one, for example {example}")


def nothing_in(what: str, part: str, name: str, feature: object) -> UserError:
    """The refusal of a part that holds no images, or no captions."""
    return UserError(
        f"{what}: {name!r} is {first_line(feature)} and holds no {part}s: name another part with "
        f"?{part}_key=NAME; paths of images are read with json: or csv:, and URLs are downloaded "
        "with img2dataset and read with webdataset:"
    )


def first_line(message: object) -> str:
    """The first line of a library's error message or description."""
    lines = str(message).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(message).__name__
