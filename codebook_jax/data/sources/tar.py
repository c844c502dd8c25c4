"""Tar shards of samples, as written by img2dataset (WebDataset's format), read by index.

A sample is an image, KEY.jpg (or png, webp, gif, bmp), with its caption in KEY.txt, or under
"caption" in KEY.json. KEY is the whole name up to its last dot; members of a sample need not be
adjacent. The headers are read once, when the source is opened; images are read from the shards when
needed.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.record import Record, checked, digest
from codebook_jax.data.sources.tar_index import (
    COMPRESSED,
    Index,
    captions_of,
    index_shard,
    unpacking,
)
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

_INDEXING_THREADS = 4  # they mostly wait for the disk; more are slower
_MOST_OPEN = 128
_COMPRESSED = re.compile(rf"(.+)\.(?:tar\.({'|'.join(COMPRESSED)})|t({'|'.join(COMPRESSED)}))")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards:
    """The samples of tar shards, in the order of the shards; files are opened on first use.

    The format cannot say that two samples are the same image, so the id is the number of the
    record. Samples without an image or a caption are left out and counted, and so are further
    images and texts of a sample.
    """

    def __init__(
        self, place: str, paths: Sequence[str], caption_key: str | None, *, damaged: str
    ) -> None:
        """`damaged`: if a shard is missing or truncated, or has a duplicate member or a text that
        is not UTF-8,
        "refuse" raises UserError and "skip" leaves the affected samples out.

        With `caption_key`, captions are the values at that key of the JSON files. Raises UserError
        if none is left.
        """
        self._place, self._paths, self._caption_key = place, tuple(paths), caption_key
        with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
            indexes = []
            for path, index in zip(
                paths, pool.map(partial(_indexed, caption_key=caption_key), paths), strict=True
            ):
                if (index.damage or index.faults) and damaged == "refuse":
                    pool.shutdown(cancel_futures=True)
                    raise UserError(_refusal(path, index))
                indexes.append(index)
        self._indexes = tuple(indexes)
        self._starts = np.cumsum([0, *(len(index.keys) for index in indexes)])
        self.left_out = _left_out(paths, indexes)
        further = sum(len(index.further) for index in indexes)  # members of listed samples
        self.listed = len(self) + len(self.left_out) - further
        if not len(self):
            raise UserError(_nothing(place, self.left_out))
        self._fingerprint = digest(
            ["webdataset 1", str(caption_key), *map(_summary, paths, indexes)]
        )
        self._files = _Files()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        which, own = self._found(index)
        image, size = self._indexes[which].places[own, :2]
        return Record(self._read(which, own, image, size), self._captions(which, own), int(index))

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return self._captions(*self._found(index))
        except UnreadableImage as failure:
            raise UserError(
                f"{failure}: check that the disk is mounted and the shard complete, then start "
                "again"
            ) from failure

    def name(self, index: int) -> str:
        return self._name(*self._found(index))

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"webdataset({self._place!r}, images={len(self)})"

    def _found(self, index: int) -> tuple[int, int]:
        """(which shard, sample within it) of record `index`."""
        which = int(np.searchsorted(self._starts, checked(index, len(self)), side="right")) - 1
        return which, int(index - self._starts[which])

    def _name(self, which: int, own: int) -> str:
        return f"{os.path.basename(self._paths[which])}/{self._indexes[which].keys[own]}"

    def _captions(self, which: int, own: int) -> tuple[str, ...]:
        index = self._indexes[which]
        content = self._read(which, own, *index.places[own, 2:])
        key = (self._caption_key or "caption") if index.in_json[own] else None
        captions = ()
        with contextlib.suppress(ValueError):
            captions = captions_of(content, key)
        if not captions:
            raise UnreadableImage(
                f"{self._name(which, own)}: the shard is not what it was at start"
            )
        return captions

    def _read(self, which: int, own: int, start: int, size: int) -> bytes:
        """A part of a shard; raises UnreadableImage if it cannot be read or is no longer there."""
        try:
            content = self._files[self._paths[which]].read(int(start), int(size))
        except OSError as failure:
            raise UnreadableImage(f"{self._name(which, own)}: {failure.strerror}") from failure
        if len(content) < size:
            raise UnreadableImage(
                f"{self._name(which, own)}: the shard is not what it was at start"
            )
        return content


def open_webdataset(request: Request) -> Shards:
    """`webdataset:PLACE`: a tar file, a folder of them, or a pattern such as `*.tar` or
    `{00000..00331}.tar`.
    """
    damaged = request.settings.damaged_shards
    paths = shard_paths(request.place)
    return Shards(request.place, paths, request.options.get("caption_key"), damaged=damaged)


def shard_paths(place: str) -> list[str]:
    """The shards that a place names, sorted for a pattern or a folder; raises UserError if there
    are none.

    Shards named in full, also by ranges in braces, need not exist.
    """
    if "://" in place or place.startswith("pipe:"):
        raise UserError(
            f"webdataset:{place} is not a path on this machine: download the shards and give their "
            "path"
        )
    if os.path.isdir(place):
        return _shards_in(place)
    paths = []
    for path in [place] if os.path.exists(place) else _unfolded(place):
        pattern = path if glob.has_magic(path) else glob.escape(path)
        found = [path] if os.path.exists(path) else sorted(glob.glob(pattern, recursive=True))
        if not found and path.endswith(".tar"):
            _refuse_compressed(sorted(glob.glob(f"{pattern[:-2]}*", recursive=True)))
        paths += found or ([] if glob.has_magic(path) else [path])
    if not paths:
        raise UserError(
            f"webdataset:{place} matches no file: give the path of a tar file, a folder of them, "
            "or a pattern such as "
            "data/*.tar or data/{00000..00331}.tar"
        )
    return paths


def _shards_in(folder: str) -> list[str]:
    """The shards of a folder; raises UserError if one exists only compressed."""
    held = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    _refuse_compressed(held)
    paths = [path for path in held if path.endswith(".tar")]
    if not paths:
        raise UserError(
            f"{folder} holds no .tar files: give a folder of shards, or the path of one"
        )
    return paths


def _refuse_compressed(paths: Sequence[str]) -> None:
    """Raises UserError if one of these files is a compressed shard without its unpacked version."""
    there = set(paths)
    for path in paths:
        found = _COMPRESSED.fullmatch(path)
        if found and f"{found[1]}.tar" not in there:
            tool = COMPRESSED[found[2] or found[3]][1]
            raise UserError(f"{path} is compressed: {unpacking(tool)}")


def _unfolded(place: str) -> list[str]:
    """The paths that ranges {00..12} and lists {a,b} in braces expand to, as in a shell."""
    choices = []
    for number, part in enumerate(re.split(r"\{([^{}]*)\}", place)):
        bounds = _RANGE.fullmatch(part)
        if number % 2 == 0:
            choices.append([part])
        elif bounds:
            first, last = bounds.groups()
            width = max(map(len, bounds.groups())) if "0" in (first[0], last[0]) else 0
            choices.append([f"{n:0{width}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]


def _indexed(path: str, caption_key: str | None) -> Index:
    try:
        return index_shard(path, caption_key)
    except OSError as failure:
        nothing = np.zeros((0, 4), np.int64)
        why = f"cannot be read ({failure.strerror})"
        return Index((), nothing, np.zeros(0, bool), [], [], [], "", why)


def _refusal(path: str, index: Index) -> str:
    skip = "--config.data.damaged_shards=skip"
    if index.damage.startswith("is compressed"):
        return f"{path} {index.damage}"
    if index.damage:
        return (
            f"{path} {index.damage}: download it again, or leave the missing part out with {skip}"
        )
    more = f" (and {len(index.faults) - 1:,} more such samples)" if len(index.faults) > 1 else ""
    return (
        f"{path}: {index.faults[0]}{more}: pack the shard again with unique names and texts in "
        f"UTF-8, or leave such samples out with {skip}"
    )


def _left_out(paths: Sequence[str], indexes: Sequence[Index]) -> list[tuple[str, str]]:
    """(name, why) of samples left out, of further members of used samples, and of damaged
    shards.
    """
    left_out = []
    for path, index in zip(paths, indexes, strict=True):
        shard, unused = os.path.basename(path), index.left_out + index.further
        left_out += [(f"{shard}/{name}", f"{shard}/{name} {why}") for name, why in unused]
        if index.damage:
            left_out.append((shard, f"{path} {index.damage}: the rest is left out"))
    return left_out


def _nothing(place: str, left_out: Sequence[tuple[str, str]]) -> str:
    if not left_out:
        return f"webdataset:{place} has no samples: give shards that hold KEY.jpg and KEY.txt"
    return (
        f"webdataset:{place} has no sample with an image and a caption (first: {left_out[0][1]}): "
        "give shards that hold KEY.jpg and KEY.txt, or name the caption's key in KEY.json with "
        "?caption_key=NAME"
    )


def _summary(path: str, index: Index) -> str:
    return f"{os.path.basename(path)} {index.fingerprint} {index.damage}"


class _File:
    """An open file that several threads read from; closed when the last of them releases it."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._number, size, start)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it may never have been opened
            os.close(self._number)


class _Files:
    """Files by path; keeps the most recently used open, and reopens them in another process."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), OrderedDict()

    def __getitem__(self, path: str) -> _File:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        file = _File(path)  # outside the lock: on a network disk all threads would wait
        with self._lock:
            self._open[path] = file
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, ()
