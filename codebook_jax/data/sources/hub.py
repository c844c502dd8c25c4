"""Data sets of Hugging Face's `datasets`: Parquet files, what its `save_to_disk` wrote, or a name
on the hub. The library copies Parquet files and hub data to Arrow files in its own cache.
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
from codebook_jax.data.sources import library_datasets as library
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

    def __init__(self, what: str, table: Dataset, columns: library.Parts, *, merge: bool) -> None:
        self.form, _, self.place = what.partition(":")
        self._what, self._columns, self.listed = what, columns, len(table)
        self._tables = {name: table.select_columns([name]) for name in columns if name}
        content = hashlib.sha256(repr(("hf 1", *columns)).encode())
        silent, imageless, hashes = _scan(table, columns, content)
        self._rows = np.flatnonzero(~(silent | imageless))
        if not len(self._rows):
            part = "caption" if silent.all() else "image"
            column = getattr(columns, part)
            raise library.nothing_in(what, part, column, table.features[column])
        content.update(np.packbits(imageless).tobytes())
        self._first = self._ids = np.arange(len(self._rows) + 1)
        if columns.id is not None:
            self._ids = numbered(hashes[self._rows])[1]
            content.update(self._ids.astype("<i4").tobytes())
        if merge and columns.id is not None:
            order, self._first = grouped(self._ids)
            self._rows = self._rows[order]
            self._ids = np.arange(len(self._first))  # each an image, in order of first appearance
        self._fingerprint = content.hexdigest()
        self.left_out = [
            (self._called(row), f"{what} row {row} {NO_CAPTION if silent[row] else 'has no image'}")
            for row in np.flatnonzero(silent | imageless).tolist()
        ]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Record:
        rows = self._rows_of(index)
        image = self._read(self._columns.image, rows[0])
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            raise UnreadableImage(f"{self._what} row {rows[0]}: the image is empty")
        return Record(image, self._captions(rows), int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._captions(self._rows_of(index))

    def name(self, index: int) -> str:
        return self._called(self._rows_of(index)[0])

    def _rows_of(self, index: int) -> list[int]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return self._rows[first:stop].tolist()

    def _captions(self, rows: list[int]) -> tuple[str, ...]:
        texts = library.texts_in([self._read(self._columns.caption, row) for row in rows])
        return tuple(dict.fromkeys(texts))

    def _called(self, row: int) -> str:
        key = None
        with contextlib.suppress(UnreadableImage):
            key = self._columns.id and self._read(self._columns.id, row)
        return f"{self._what} row {row}" if key is None else str(key)

    def _read(self, column: str, row: int) -> Any:
        try:
            return self._tables[column][row][column]
        except Exception as failure:  # OSError, Arrow's own
            raise UnreadableImage(
                f"{self._what} row {row}: {library.first_line(failure)}"
            ) from failure


def open_hugging_face(request: Request) -> Rows:
    """`hf:PLACE:SPLIT`: a folder, Parquet file or name on the hub; SPLIT may be `train[:50%]`."""
    try:
        import datasets  # here: it takes a second
    except ImportError as failure:
        cure = 'pip install "codebook_jax[hf]"'
        raise UserError(f"hf: sources need Hugging Face's datasets: {cure}") from failure
    what, place, split = library.place_of(request)
    table = _loaded(datasets, what, place, split)
    if isinstance(table, dict):
        split = split or library.only_split(what, list(table))
        if split not in table:
            raise UserError(f"{what} has no split {split!r}: its splits are {', '.join(table)}")
        table = table[split]
    what = f"{what}:{split}" if split else what
    columns = library.parts_of(what, request, table.column_names)
    feature = table.features[columns.image]
    if isinstance(feature, datasets.Image):  # as the bytes or paths of files
        table = table.cast_column(columns.image, datasets.Image(decode=False))
    elif not (isinstance(feature, dict) and "bytes" in feature):
        if getattr(feature, "dtype", "") not in ("binary", "large_binary"):
            raise library.nothing_in(what, "image", columns.image, feature)
    return Rows(what, table, columns, merge=request.merge)


def _loaded(
    datasets: ModuleType, what: str, place: str, split: str | None
) -> Dataset | DatasetDict:
    """The table of a split, or {split: table}; raises UserError if it cannot be loaded."""
    reachable = os.path.exists(place) or hub_reachable()
    try:
        with _quiet(datasets, offline=not reachable):
            if os.path.isfile(place):
                return datasets.load_dataset("parquet", data_files=place, split=split or "train")
            if not any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
                return datasets.load_dataset(place, split=split)
            saved = datasets.load_from_disk(place)
    except Exception as failure:  # the library's, its HTTP library's, Arrow's, OSError, ...
        reason = library.first_line(failure.__cause__ or failure)
        if not reachable:
            reason = "it is not in the cache, and there is no network"
        raise UserError(
            f"{what} cannot be read ({reason}): give a folder of Parquet files, one that "
            "save_to_disk wrote, or a name on the Hugging Face hub with network access"
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
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (
            off or offline for off in before
        )
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _scan(
    table: Dataset, columns: library.Parts, content: hashlib._Hash
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: whether it has no caption, whether it has no picture, and a hash of its id (its
    own if it has none). Updates the hash `content` with all captions.
    """
    silent, imageless, hashes = np.zeros(len(table), bool), np.zeros(len(table), bool), array("Q")
    wanted = table.select_columns(list(dict.fromkeys(filter(None, columns)))).with_format("arrow")
    start = 0
    for batch in wanted.iter(batch_size=_ROWS_AT_ONCE):
        rows = slice(start, start := start + len(batch))
        captions = [library.texts_in(value) for value in batch[columns.caption].to_pylist()]
        silent[rows] = [not found for found in captions]
        content.update(repr(captions).encode("utf-8", "surrogatepass"))
        imageless[rows] = _without_picture(batch[columns.image])
        for key in batch[columns.id].to_pylist() if columns.id else ():
            hashes.append(short_hash(repr(key if key is not None else (len(hashes),))))
    return silent, imageless, np.frombuffer(hashes, np.uint64)


def _without_picture(images: pyarrow.ChunkedArray) -> np.ndarray:
    """bool [rows]: rows without a picture, from Arrow's null flags alone."""
    import pyarrow.compute

    fields = [images]
    if pyarrow.types.is_struct(images.type):
        places = [images.type.get_field_index(name) for name in ("bytes", "path")]
        fields = [pyarrow.compute.struct_field(images, place) for place in places if place >= 0]
    return np.all([field.is_null().to_numpy() for field in fields], axis=0)
