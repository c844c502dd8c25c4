"""The rows of one of Hugging Face's tables as records; they are indexed without reading the
images.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.library_datasets import first_line, texts_in
from codebook_jax.data.sources.listed import NO_CAPTION
from codebook_jax.data.sources.record import Record, checked
from codebook_jax.data.sources.texts import numbered
from codebook_jax.errors import UserError

_ROWS_AT_ONCE = 10_000


class Columns(NamedTuple):
    """The names of a table's columns."""

    image: str  # of bytes, or of {"bytes", "path"} with one of the two given
    caption: str
    id: str | None


class Rows:
    """The rows of a table as a source.

    Rows with the same id are the same image: for training each is a record; for evaluation
    (`merge`) they are one record with all their captions. Without ids, each row is an image. Rows
    without an image or a caption are left out and counted.
    """

    def __init__(self, what: str, table: Any, columns: Columns, *, merge: bool) -> None:
        """Reads the captions of all rows, but no image.

        Raises UserError if no row is usable or ids have a wrong type.
        """
        self._what, self._columns = what, columns
        self._table = table.select_columns([columns.image, columns.caption])
        self._texts = table.select_columns([columns.caption])
        self._keys = None if columns.id is None else table.select_columns([columns.id])
        self.listed, content = len(table), hashlib.sha256(repr(("hf 1", *columns)).encode())
        silent = _silent(self._texts, content)
        imageless = _imageless(table.select_columns([columns.image]))
        content.update(np.packbits(imageless).tobytes())
        self._rows = np.flatnonzero(~(silent | imageless))
        if not len(self._rows):
            raise UserError(_nothing(what, columns, table.features, bool(silent.all())))
        self._first, self._ids = np.arange(len(self._rows) + 1), None
        if self._keys is not None:
            self._ids = numbered(_numbers(what, self._keys)[self._rows])[1]
            content.update(self._ids.astype("<i4").tobytes())
            if merge:
                self._merge()
        self._fingerprint = content.hexdigest()
        self.left_out = [
            (self._called(row), f"{what} row {row} {NO_CAPTION if silent[row] else 'has no image'}")
            for row in np.flatnonzero(silent | imageless).tolist()
        ]

    def _merge(self) -> None:
        self._rows = self._rows[np.argsort(self._ids, kind="stable")]
        self._first = np.concatenate([[0], np.cumsum(np.bincount(self._ids))])
        self._ids = None  # each record is an image, in order of first appearance

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Record:
        rows = self._rows_of(index)
        content = self._read(self._table, rows[0])
        captions = (
            _unlike([content[self._columns.caption]]) if len(rows) == 1 else self._captions(rows)
        )
        image = content[self._columns.image]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            raise UnreadableImage(f"{self._what} row {rows[0]}: the image is empty")
        return Record(image, captions, int(index if self._ids is None else self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return self._captions(self._rows_of(index))
        except UnreadableImage as failure:
            raise UserError(
                f"{failure}: check that the files are there, then start again"
            ) from failure

    def name(self, index: int) -> str:
        return self._called(self._rows_of(index)[0])

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"hf({self._what.partition(':')[2]!r}, images={len(self)})"

    def _rows_of(self, index: int) -> list[int]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return self._rows[first:stop].tolist()

    def _captions(self, rows: list[int]) -> tuple[str, ...]:
        return _unlike([self._read(self._texts, row)[self._columns.caption] for row in rows])

    def _called(self, row: int) -> str:
        key = None
        if self._keys is not None:
            with contextlib.suppress(UnreadableImage):
                key = self._read(self._keys, row)[self._columns.id]
        return f"{self._what} row {row}" if key is None else str(key)

    def _read(self, table: Any, row: int) -> dict[str, Any]:
        try:
            return table[row]
        except Exception as failure:  # OSError, Arrow's own
            raise UnreadableImage(f"{self._what} row {row}: {first_line(failure)}") from failure


def _unlike(values: list[Any]) -> tuple[str, ...]:
    """The captions of an image, each once."""
    return tuple(dict.fromkeys(texts_in(values)))


def _parts(table: Any) -> Iterator[tuple[int, Any]]:
    """(number of the first row, some rows) of a one-column table, as Arrow columns."""
    start = 0
    for part in table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        yield start, part.column(0)
        start += len(part)


def _silent(texts: Any, content: Any) -> np.ndarray:
    """bool [rows]: rows without a caption; updates the hash `content` with all captions."""
    silent = np.zeros(len(texts), bool)
    for start, column in _parts(texts):
        captions = [texts_in(value) for value in column.to_pylist()]
        silent[start : start + len(captions)] = [not found for found in captions]
        content.update(repr(captions).encode("utf-8", "surrogatepass"))
    return silent


def _imageless(images: Any) -> np.ndarray:
    """bool [rows]: rows without a picture, from Arrow's null flags alone."""
    import pyarrow.compute

    imageless = np.zeros(len(images), bool)
    for start, column in _parts(images):
        fields = [column]
        if pyarrow.types.is_struct(column.type):
            places = [column.type.get_field_index(name) for name in ("bytes", "path")]
            fields = [pyarrow.compute.struct_field(column, place) for place in places if place >= 0]
        missing = [field.is_null().to_numpy() for field in fields]
        imageless[start : start + len(column)] = np.all(missing, axis=0)
    return imageless


def _numbers(what: str, keys: Any) -> np.ndarray:
    """int64 [rows]: equal for equal ids; a row without an id gets its own number."""
    import pyarrow

    [(name, feature)] = keys.features.items()
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string", "large_string")):
        raise UserError(
            f"{what}: {name!r} is {first_line(feature)}, not ids: name a column of integers or "
            "strings with ?id_key=NAME"
        )
    column = pyarrow.chunked_array([column for _, part in _parts(keys) for column in part.chunks])
    encoded = column.combine_chunks().dictionary_encode()
    numbers = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    without = numbers < 0
    numbers[without] = len(encoded.dictionary) + np.arange(without.sum())
    return numbers


def _nothing(what: str, columns: Columns, features: Any, silent: bool) -> str:
    part, column = ("caption", columns.caption) if silent else ("image", columns.image)
    return (
        f"{what} has no row with an image and a caption: {column!r}, which is "
        f"{first_line(features[column])}, holds no {part}s: name the column that does with "
        f"?{part}_key=NAME"
    )
