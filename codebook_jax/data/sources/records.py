"""Pairs or examples that --mode=prepare packed, read by index; `codebook_jax.data.packing`
describes the folder.
"""

from __future__ import annotations

import functools
import resource
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from codebook_jax.data.manifest import Manifest, Shard, index_name, misfits, read_manifest
from codebook_jax.data.sources.examples import ANSWERED, frozen, lacks
from codebook_jax.data.sources.record import (
    Example,
    Record,
    Request,
    WithoutCaption,
    checked,
    digest,
    part_of,
)
from codebook_jax.data.sources.rows import Parts, Rows
from codebook_jax.data.sources.texts import grouped, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader


class Records(Rows):
    """The records of a packed folder; files are opened on first use.

    For evaluation, pairs of one image id with the same picture are one, with all captions.
    """

    _parts = Parts("image", "captions", "name")

    def __init__(self, request: Request) -> None:
        """Raises UserError if a shard is missing or has another size, and is not to be skipped, and
        in training if no example has an answer.
        """
        self.form, self.place, self._role = request.scheme, request.place, request.role
        manifest = read_manifest(self.place)
        self.kind = manifest.kind
        merge = request.merge and self.kind == "pairs"
        if request.role == "train" and self.kind in ANSWERED:
            if manifest.captions == manifest.records:  # each has its text alone
                cure = "pack a list that has them to train on"
                raise UserError(f"{self.place} holds {self.kind} without answers: {cure}")
        self._shards, self.left_out = _sound(self.place, manifest, request.settings.damaged_shards)
        self._starts = np.cumsum([0, *(shard.records for shard in self._shards)])
        self.listed, self._count = manifest.listed, int(self._starts[-1])
        self._fingerprint = digest([f"records 1 {merge}", *(s.sha256 for s in self._shards)])
        self._groups = self._merged() if merge else None

    def __getitem__(self, index: int) -> Record | Example:
        if self.kind == "pairs":
            return super().__getitem__(index)
        row = self._row(int(checked(index, len(self))), "image")
        example = Example(*(frozen(row[name]) for name in Example._fields))
        if why := lacks(example, self.kind, self._role):
            raise WithoutCaption(f"{self._place(index)} {why}")
        return example

    def pictures(self, index: int) -> tuple[str, ...]:
        if self.kind == "pairs":
            return super().pictures(index)
        return tuple(self._row(int(checked(index, len(self))), "id", is_needed=True)["pictures"])

    def _place(self, row: int) -> str:
        which, place = part_of(self._starts, row)
        return f"{self.place}/{self._shards[which].file}, record {place}"

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        which, place = part_of(self._starts, row)
        file = self._shards[which].file
        if part == "image":
            packed = _reader(f"{self.place}/{file}", self._fingerprint).read([place])[0]
            return msgpack.unpackb(packed, unicode_errors="surrogatepass")
        try:
            return parse_json(_index(f"{self.place}/{index_name(file)}", self._fingerprint)[place])
        except (OSError, ValueError, IndexError) as failure:
            raise UserError(
                f"{self.place}/{index_name(file)}, line {place + 1} cannot be read ({failure}): "
                "run the same --mode=prepare command again; it repacks damaged shards"
            ) from failure

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        texts = [text for row in rows for text in row["captions"]]
        texts = texts if self._groups is None else dict.fromkeys(texts)
        return tuple(filter(has_words, texts))  # older versions packed captions without words

    def _image_id(self, index: int, row: Mapping[str, Any]) -> int:
        return row["image_id"]

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        """The records of the shards grouped by image; reads all indexes."""
        entries = (self._read(row, "id") for row in range(self._count))
        keys = (repr((entry["image_id"], entry["sha256"])) for entry in entries)
        hashes = np.frombuffer(array("Q", map(short_hash, keys)), np.uint64)
        return grouped(numbered(hashes)[1])


def _sound(folder: str, manifest: Manifest, damaged: str) -> tuple[list[Shard], list]:
    """(shards with complete files, (file, why) of the others); `damaged` as in the config."""
    wrong = dict(misfits(folder, manifest.shards))
    sound = [shard for number, shard in enumerate(manifest.shards) if number not in wrong]
    if (wrong and damaged == "refuse") or not any(shard.records for shard in sound):
        raise UserError(
            f"{folder}: {next(iter(wrong.values()), 'it has no records')} ({len(wrong)} of "
            f"{len(manifest.shards)} shards are damaged): run the same --mode=prepare command "
            "again, it repacks damaged shards; or leave them out with "
            "--config.data.damaged_shards=skip"
        )
    lost = [(manifest.shards[number], why) for number, why in wrong.items()]
    return sound, [(s.file, f"{why}: {s.records:,} records left out") for s, why in lost]


@functools.lru_cache(max(8, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)))
def _reader(path: str, source: str) -> ArrayRecordReader:
    """The reader of a shard of a source with this fingerprint; several threads may use it."""
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(
        path,
        options="readahead_buffer_size:0",  # records are read singly, in random order
        file_reader_buffer_size=1 << 15,
    )


@functools.lru_cache(8)
def _index(path: str, source: str) -> list[bytes]:
    """The lines of the index of a shard of a source with this fingerprint."""
    return Path(path).read_bytes().split(b"\n")
