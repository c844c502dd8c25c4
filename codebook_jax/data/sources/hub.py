"""Data sets of Hugging Face's `datasets`: Parquet files, what its `save_to_disk` wrote, or a name
on the hub.

Rows are read from Arrow files on disk. The library copies Parquet files and hub data to its own
cache, `~/.cache/huggingface/datasets` unless HF_HOME or HF_DATASETS_CACHE names another place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.network import hub_reachable
from codebook_jax.data.sources.library_datasets import (
    Parts,
    check_folder,
    first_line,
    needs,
    no_picture,
    only_split,
    parts_of,
    place_and_split,
    texts_in,
)
from codebook_jax.data.sources.record import (
    NO_CAPTION,
    NamedSource,
    Record,
    Request,
    checked,
    required,
)
from codebook_jax.data.sources.texts import grouped, numbered, short_hash
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

_SAVED = ("state.json", "dataset_dict.json")  # files that save_to_disk writes
_ROWS_AT_ONCE = 10_000


class Rows(NamedSource):
    """The rows of a table as a source; those without an image or a caption are left out.

    Rows with the same id are the same image, and with `merge` one record. Without ids, each row is
    an image. All captions are read at start, but no image.
    """

    def __init__(self, what: str, table: Dataset, columns: Parts, *, merge: bool) -> None:
        self.form, _, self.place = what.partition(":")
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
            part = "caption" if silent.all() else "image"
            column = getattr(columns, part)
            raise UserError(
                f"{what} has no row with an image and a caption: {column!r}, which is "
                f"{first_line(table.features[column])}, holds no {part}s: name another column with "
                f"?{part}_key=NAME"
            )
        self._first, self._ids = np.arange(len(self._rows) + 1), None
        if self._keys is not None:
            self._ids = numbered(_hashes(self._keys)[self._rows])[1]
            content.update(self._ids.astype("<i4").tobytes())
        if merge and self._ids is not None:
            order, self._first = grouped(self._ids)
            self._rows = self._rows[order]
            self._ids = None  # each record is an image, in order of first appearance
        self._fingerprint = content.hexdigest()
        self.left_out = [
            (self._called(row), f"{what} row {row} {NO_CAPTION if silent[row] else 'has no image'}")
            for row in np.flatnonzero(silent | imageless).tolist()
        ]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Record:
        rows = self._rows_of(index)
        content = self._read(self._table, rows[0])
        alone, image = len(rows) == 1, content[self._columns.image]
        captions = _distinct([content[self._columns.caption]]) if alone else self._captions(rows)
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            raise UnreadableImage(f"{self._what} row {rows[0]}: the image is empty")
        return Record(image, captions, int(index if self._ids is None else self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._captions(self._rows_of(index))

    def name(self, index: int) -> str:
        return self._called(self._rows_of(index)[0])

    def _rows_of(self, index: int) -> list[int]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return self._rows[first:stop].tolist()

    def _captions(self, rows: list[int]) -> tuple[str, ...]:
        return _distinct([self._read(self._texts, row)[self._columns.caption] for row in rows])

    def _called(self, row: int) -> str:
        key = None
        if self._keys is not None:
            with contextlib.suppress(UnreadableImage):
                key = self._read(self._keys, row)[self._columns.id]
        return f"{self._what} row {row}" if key is None else str(key)

    def _read(self, table: Dataset, row: int) -> dict[str, Any]:
        try:
            return table[row]
        except Exception as failure:  # OSError, Arrow's own
            raise UnreadableImage(f"{self._what} row {row}: {first_line(failure)}") from failure


def open_hugging_face(request: Request) -> Rows:
    """`hf:PLACE:SPLIT`: a folder, Parquet file or name on the hub; SPLIT may be `train[:50%]`."""
    try:
        import datasets  # here: it takes a second
    except ImportError as failure:
        raise needs("hf", "Hugging Face's datasets") from failure
    place, split = place_and_split(request.place)
    what = f"hf:{place}"
    check_folder(what, place)
    table = _loaded(datasets, what, place, split)
    if isinstance(table, dict):
        split = split or only_split(what, list(table))
        if split not in table:
            raise UserError(f"{what} has no split {split!r}: its splits are {', '.join(table)}")
        table = table[split]
    what = f"{what}:{split}" if split else what
    columns = parts_of(what, request, table.column_names)
    table = _undecoded(datasets, what, table, columns.image)
    return Rows(what, table, columns, merge=request.merge)


def _loaded(
    datasets: ModuleType, what: str, place: str, split: str | None
) -> Dataset | DatasetDict:
    """The table of a split, or {split: table}; raises UserError if it cannot be loaded."""
    here = os.path.exists(place)
    reachable = here or hub_reachable()
    try:
        with _quiet(datasets, offline=not reachable):
            if os.path.isfile(place):
                return datasets.load_dataset("parquet", data_files=place, split=split or "train")
            if not any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
                return datasets.load_dataset(place, split=split)
            saved = datasets.load_from_disk(place)
    except Exception as failure:  # the library's, its HTTP library's, Arrow's, OSError, ...
        reason = first_line(failure.__cause__ or failure)
        cure = "give a folder of Parquet files, or one that save_to_disk wrote"
        if here:
            raise UserError(f"{what} cannot be read ({reason}): {cure}") from failure
        reason = reason if reachable else "there is no network, and it is not in the cache"
        raise UserError(
            f"{what} is not a folder here and could not be loaded from the Hugging Face hub "
            f"({reason}): {cure}, or a name on the hub with network access"
        ) from failure
    if not isinstance(saved, dict) and split not in (None, "train", str(saved.split)):
        raise UserError(f"{what} is a single table and has no split {split!r}: leave the split out")
    return saved


@contextlib.contextmanager
def _quiet(datasets: ModuleType, *, offline: bool) -> Iterator[None]:
    """Without progress bars and warnings; `offline` without trying the hub, which takes 20 s."""
    from huggingface_hub import constants

    logging = datasets.utils.logging
    bars, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    before = [(module, module.HF_HUB_OFFLINE) for module in (constants, datasets.config)]
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        for module, already in before:
            module.HF_HUB_OFFLINE = already or offline
        yield
    finally:
        for module, already in before:
            module.HF_HUB_OFFLINE = already
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _undecoded(datasets: ModuleType, what: str, table: Dataset, image: str) -> Dataset:
    """The table with its pictures as the bytes or paths of files."""
    feature = table.features[image]
    if isinstance(feature, datasets.Image):
        return table.cast_column(image, datasets.Image(decode=False))
    kind = getattr(feature, "dtype", "")
    if kind in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
        return table
    raise no_picture(what, image, feature)


def _distinct(values: list[Any]) -> tuple[str, ...]:
    """The captions of an image, each once."""
    return tuple(dict.fromkeys(texts_in(values)))


def _batches(table: Dataset) -> Iterator[tuple[slice, pyarrow.ChunkedArray]]:
    """(which rows, their values) of a one-column table, some rows at a time."""
    start = 0
    for batch in table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        yield slice(start, start + len(batch)), batch.column(0)
        start += len(batch)


def _silent(texts: Dataset, content: hashlib._Hash) -> np.ndarray:
    """bool [rows]: rows without a caption; updates the hash `content` with all captions."""
    silent = np.zeros(len(texts), bool)
    for rows, column in _batches(texts):
        captions = [texts_in(value) for value in column.to_pylist()]
        silent[rows] = [not found for found in captions]
        content.update(repr(captions).encode("utf-8", "surrogatepass"))
    return silent


def _imageless(images: Dataset) -> np.ndarray:
    """bool [rows]: rows without a picture, from Arrow's null flags alone."""
    import pyarrow.compute

    imageless = np.zeros(len(images), bool)
    for rows, column in _batches(images):
        fields = [column]
        if pyarrow.types.is_struct(column.type):
            places = [column.type.get_field_index(name) for name in ("bytes", "path")]
            fields = [pyarrow.compute.struct_field(column, place) for place in places if place >= 0]
        imageless[rows] = np.all([field.is_null().to_numpy() for field in fields], axis=0)
    return imageless


def _hashes(keys: Dataset) -> np.ndarray:
    """uint64 [rows]: equal for equal ids; a row without an id has its own."""
    hashes = array("Q")
    for _, column in _batches(keys):
        for key in column.to_pylist():
            hashes.append(short_hash(repr(key if key is not None else (len(hashes),))))
    return np.frombuffer(hashes, np.uint64)
