"""Pairs that --mode=prepare packed, read by index: `codebook_jax.data.packing` describes the
folder.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.manifest import Manifest, Shard, index_name, misfits, read_manifest
from codebook_jax.data.packing import unpack
from codebook_jax.data.sources.listed import NO_CAPTION
from codebook_jax.data.sources.record import Record, WithoutCaption, checked, digest
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

_INDEXES_HELD = 8
_READER_OPTIONS = "readahead_buffer_size:0"  # records are read singly, in random order
_READER_BUFFER_BYTES = 1 << 15

Opened = TypeVar("Opened")


class Images(NamedTuple):
    """Groups the records of the shards that belong to one image."""

    members: np.ndarray  # int64 [records]; those of an image are adjacent
    first: np.ndarray  # int64 [images + 1]: where the members of each begin


class Records:
    """The records of a packed folder; files are opened on first use.

    For evaluation (`merge`), records of one image id with the same picture are merged into one with
    all captions.
    """

    def __init__(self, folder: str, manifest: Manifest, *, merge: bool, damaged: str) -> None:
        """`damaged`: "refuse" raises UserError if a shard is missing or has another size, "skip"
        leaves it out.
        """
        self._folder = os.fspath(folder)
        self._shards, self.left_out = _sound(self._folder, manifest, damaged)
        self._starts = np.cumsum([0, *(shard.records for shard in self._shards)])
        self.listed = manifest.listed
        self._fingerprint = digest(
            [f"records 1 {merge}", *(shard.sha256 for shard in self._shards)]
        )
        self._readers = _Recent(_Reader(self._folder), _most_readers())
        self._indexes = _Recent(_Index(self._folder), _INDEXES_HELD)
        self._images = self._merged() if merge else None

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._images is None else len(self._images.first) - 1

    def __getitem__(self, index: int) -> Record:
        own = self._members(index)[0]
        shard, place = self._place(own)
        content = self._content(shard, place)
        alone = self._images is None
        captions = _with_words(content["captions"]) if alone else self.captions(index)
        if not captions:  # packed by an older version, which kept them
            raise WithoutCaption(f"{self._folder}/{shard.file}, record {place} {NO_CAPTION}")
        return Record(content["image"], captions, content["image_id"])

    def captions(self, index: int) -> tuple[str, ...]:
        texts = (text for own in self._members(index) for text in self._entry(own)["captions"])
        return _with_words(texts if self._images is None else dict.fromkeys(texts))

    def name(self, index: int) -> str:
        return self._entry(self._members(index)[0])["name"]

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"records({self._folder!r}, images={len(self)})"

    def _members(self, index: int) -> Sequence[int]:
        checked(index, len(self))
        if self._images is None:
            return (index,)
        first, stop = self._images.first[index : index + 2]
        return self._images.members[first:stop]

    def _place(self, own: int) -> tuple[Shard, int]:
        """(shard, place within it) of a record of the shards."""
        which = int(np.searchsorted(self._starts, own, side="right")) - 1
        return self._shards[which], int(own - self._starts[which])

    def _content(self, shard: Shard, place: int) -> dict[str, Any]:
        """A packed record; raises UnreadableImage if the shard no longer holds it."""
        try:
            return unpack(self._readers[shard.file].read([place])[0])
        except (
            Exception
        ) as failure:  # RuntimeError and IndexError of ArrayRecord, many kinds of msgpack
            why = str(failure).split(";")[0].splitlines()[0] if str(failure) else repr(failure)
            raise UnreadableImage(
                f"{self._folder}/{shard.file}, record {place}: {why}"
            ) from failure

    def _entry(self, own: int) -> dict[str, Any]:
        """A line of an index."""
        shard, place = self._place(own)
        try:
            return parse_json(self._indexes[shard.file][place])
        except (OSError, ValueError, IndexError) as failure:
            raise UserError(
                f"{self._folder}/{index_name(shard.file)}, line {place + 1} cannot be read "
                f"({failure}): run the same --mode=prepare command again; it repacks damaged "
                "shards"
            ) from failure

    def _merged(self) -> Images:
        """The records of each image, in order of first appearance; reads all indexes."""
        numbers: dict[tuple[int, str], int] = {}
        images = array("q")
        for own in range(int(self._starts[-1])):
            entry = self._entry(own)
            key = entry["image_id"], entry["sha256"]
            images.append(numbers.setdefault(key, len(numbers)))
        which = np.frombuffer(images, np.int64)
        first = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(numbers)))])
        return Images(np.argsort(which, kind="stable"), first)


def open_records(request: Request) -> Records:
    """`records:FOLDER`: see the module."""
    damaged = request.settings.damaged_shards
    manifest = read_manifest(request.place)
    return Records(request.place, manifest, merge=request.merge, damaged=damaged)


def _with_words(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(has_words, captions))


def _sound(
    folder: str, manifest: Manifest, damaged: str
) -> tuple[tuple[Shard, ...], list[tuple[str, str]]]:
    """(shards with complete files, (file, why) of the others); raises UserError if `damaged` is
    "refuse".
    """
    wrong = dict(misfits(folder, manifest.shards))
    if wrong and damaged == "refuse":
        why = next(iter(wrong.values()))
        more = f", and {len(wrong) - 1} more shards are damaged" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder}: {why}{more}: run the same --mode=prepare command again, it repacks damaged "
            "shards; or leave them out with --config.data.damaged_shards=skip"
        )
    sound = tuple(s for number, s in enumerate(manifest.shards) if number not in wrong)
    if not sum(shard.records for shard in sound):
        raise UserError(
            f"{folder}: every shard is damaged: pack the source again with --mode=prepare"
        )
    left_out = [
        (
            manifest.shards[number].file,
            f"{why}: {manifest.shards[number].records:,} records left out",
        )
        for number, why in wrong.items()
    ]
    return sound, left_out


class _Recent(Generic[Opened]):
    """Keeps the last opened files by name, and reopens others when needed.

    Safe to use from several threads.
    """

    def __init__(self, opens: Callable[[str], Opened], most: int) -> None:
        self._opens, self._most = opens, most
        self._lock, self._held = threading.Lock(), OrderedDict()

    def __getitem__(self, name: str) -> Opened:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        opened = self._opens(name)  # outside the lock: on a network disk all threads would wait
        with self._lock:
            self._held[name] = opened
            while len(self._held) > self._most:
                self._held.popitem(
                    last=False
                )  # it closes when the last thread reading from it is done
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {"_opens": self._opens, "_most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_opens"], state["_most"])


class _Reader:
    """Opens a shard by name. A class, so that it can be pickled."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Any:
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordReader(
            os.path.join(self._folder, name),
            options=_READER_OPTIONS,
            file_reader_buffer_size=_READER_BUFFER_BYTES,
        )


class _Index:
    """Reads the lines of a shard's index by the shard's name."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, name: str) -> list[bytes]:
        return (Path(self._folder) / index_name(name)).read_bytes().split(b"\n")


def _most_readers() -> int:
    """How many shards a source keeps open: a quarter of the process's limit, since a mixture has
    several sources.
    """
    import resource

    return max(8, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
