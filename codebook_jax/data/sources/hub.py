"""Data sets of Hugging Face's `datasets`: Parquet files, what its `save_to_disk` wrote, or a name
on the hub. The library copies Parquet files and hub data to Arrow files in its own cache.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import constants

from codebook_jax.data.network import hub_reachable
from codebook_jax.data.sources import rows
from codebook_jax.data.sources.record import NO_CAPTION, PARTS, Request
from codebook_jax.data.sources.texts import grouped, numbered, short_hash
from codebook_jax.errors import UserError, reason

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED = ("state.json", "dataset_dict.json")  # files that save_to_disk writes
_ROWS_AT_ONCE = 10_000


class TableRows(rows.Rows):
    """The rows of a table; those without an image or a caption are left out. Rows with the same id
    are the same image, and with `merge` one record. All captions are read at start, but no image.
    """

    def __init__(self, what: str, table: Dataset, parts: rows.Parts, *, merge: bool) -> None:
        self.form, _, self.place = what.partition(":")
        self.listed, self._parts = len(table), parts
        columns = [parts.image, parts.caption], [parts.caption], [parts.id or parts.caption]
        self._tables = dict(zip(PARTS, map(table.select_columns, columns), strict=True))
        content = hashlib.sha256(repr(("hf 1", *parts)).encode())
        silent, imageless, hashes = _scan(table, parts, content)
        usable = np.flatnonzero(~(silent | imageless))
        if not len(usable):
            part = "caption" if silent.all() else "image"
            column = getattr(parts, part)
            raise rows.nothing_in(what, part, column, table.features[column])
        content.update(np.packbits(imageless).tobytes())
        first = self._ids = np.arange(len(usable) + 1)
        if parts.id is not None:
            self._ids = numbered(hashes[usable])[1]
            content.update(self._ids.astype("<i4").tobytes())
        if merge and parts.id is not None:
            order, first = grouped(self._ids)
            usable = usable[order]
            self._ids = np.arange(len(first))  # each an image, in order of first appearance
        self._groups, self._fingerprint = (usable, first), content.hexdigest()
        whys = np.where(silent, NO_CAPTION, "has no image").tolist()
        self.left_out = [
            (self._named(row), f"{self._place(row)} {whys[row]}")
            for row in np.flatnonzero(silent | imageless).tolist()
        ]

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        return self._tables[part][row]

    def _place(self, row: int) -> str:
        return f"{self.form}:{self.place} row {row}"

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(super()._texts(rows)))


def open_hugging_face(request: Request) -> TableRows:
    """`hf:PLACE:SPLIT`: a folder, Parquet file or name on the hub; SPLIT may be `train[:50%]`."""
    try:
        import datasets  # here: it takes a second
    except ImportError as failure:
        cure = 'pip install "codebook_jax[hf]"'
        raise UserError(f"hf: sources need Hugging Face's datasets: {cure}") from failure
    what, place, split = rows.place_of(request)
    table = _loaded(datasets, what, place, split)
    if isinstance(table, dict):
        split = split or rows.only_split(what, list(table))
        if split not in table:
            raise UserError(f"{what} has no split {split!r}: its splits are {', '.join(table)}")
        table = table[split]
    what = f"{what}:{split}" if split else what
    parts = rows.parts_of(what, request, table.column_names, rows.USUAL)
    feature = table.features[parts.image]
    if isinstance(feature, datasets.Image):  # as the bytes or paths of files
        table = table.cast_column(parts.image, datasets.Image(decode=False))
    elif not (isinstance(feature, dict) and "bytes" in feature):
        if getattr(feature, "dtype", "") not in ("binary", "large_binary"):
            raise rows.nothing_in(what, "image", parts.image, feature)
    return TableRows(what, table, parts, merge=request.merge)


def _loaded(datasets: ModuleType, what: str, place: str, split: str | None) -> Dataset | dict:
    """The table of a split, or {split: table}; raises UserError if it cannot be loaded."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    if not os.path.exists(place) and not hub_reachable():  # read the cache, without 20 s of tries
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        if os.path.isfile(place):
            return datasets.load_dataset("parquet", data_files=place, split=split or "train")
        if not any(os.path.isfile(os.path.join(place, name)) for name in _SAVED):
            return datasets.load_dataset(place, split=split)
        saved = datasets.load_from_disk(place)
    except Exception as failure:  # the library's, its HTTP library's, Arrow's, OSError, ...
        raise UserError(
            f"{what} cannot be read ({reason(failure.__cause__ or failure)}): give a "
            "folder of Parquet files, one that save_to_disk wrote, or a name on the Hugging Face "
            "hub, with network access or the data in its cache"
        ) from failure
    if not isinstance(saved, dict) and split not in (None, "train", str(saved.split)):
        raise UserError(f"{what} is a single table and has no split {split!r}: leave the split out")
    return saved


def _scan(
    table: Dataset, parts: rows.Parts, content: hashlib._Hash
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: whether it has no caption, whether no picture (by Arrow's null flags), and a
    hash of its id (its own if it has none). Updates the hash `content` with all captions.
    """
    silent, imageless, hashes = [np.zeros(0, bool)], [np.zeros(0, bool)], array("Q")
    wanted = table.select_columns(list(dict.fromkeys(filter(None, parts)))).with_format("arrow")
    for batch in wanted.iter(batch_size=_ROWS_AT_ONCE):
        captions = [rows.texts_in(value) for value in batch[parts.caption].to_pylist()]
        content.update(repr(captions).encode("utf-8", "surrogatepass"))
        silent.append([not found for found in captions])
        pictures = batch[parts.image]
        names = [pictures.type.field(n).name for n in range(pictures.type.num_fields)] or [None]
        fields = zip(names, pictures.flatten(), strict=True)
        nulls = [each.is_null() for name, each in fields if name in (None, "bytes", "path")]
        imageless.append(np.all([null.to_numpy() for null in nulls], axis=0))
        for key in batch[parts.id].to_pylist() if parts.id else ():
            hashes.append(short_hash(repr(key if key is not None else (len(hashes),))))
    return np.concatenate(silent), np.concatenate(imageless), np.frombuffer(hashes, np.uint64)
