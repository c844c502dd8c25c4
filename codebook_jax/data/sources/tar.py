"""Tar shards of samples, as written by img2dataset (WebDataset's format), read by index.

A sample is an image, KEY.jpg (or png, webp, gif, bmp), with its caption in KEY.txt, or under
"caption" in KEY.json. KEY is the whole name up to its last dot; members of a sample need not be
adjacent. Only headers and captions are read when the source is opened (`tar_index`).
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.record import (
    NamedSource,
    Recent,
    Record,
    Request,
    digest,
    part_of,
    required,
)
from codebook_jax.data.sources.tar_index import COMPRESSED, Index, captions_of, index_shard
from codebook_jax.errors import UserError

_INDEXING_THREADS = 4  # they mostly wait for the disk; more are slower
_MOST_OPEN = 128
_COMPRESSED = re.compile(rf"(.+)\.(?:tar\.|t)(?:{'|'.join(COMPRESSED)})")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards(NamedSource):
    """The samples of tar shards, in the order of the shards; files are opened on first use.

    The id of an image is the number of the record: the format has none. Samples without an image or
    a caption are left out and counted, and so are further images and texts of a sample.
    """

    def __init__(
        self, place: str, paths: Sequence[str], caption_key: str | None, *, damaged: str
    ) -> None:
        """With `caption_key`, captions are the values at that key of the JSON files.

        `damaged` decides about samples of shards that are missing or truncated, or have a duplicate
        member or a text that is not UTF-8: "refuse" raises UserError, "skip" leaves them out.
        """
        self.form, self.place = "webdataset", place
        self._paths, self._caption_key = tuple(paths), caption_key
        self._indexes = _indexed(paths, caption_key, damaged)
        self._starts = np.cumsum([0, *(len(index.keys) for index in self._indexes)])
        self.left_out: list[tuple[str, str]] = []
        contents = ["webdataset 1", str(caption_key)]
        for path, index in zip(paths, self._indexes, strict=True):
            shard, unused = os.path.basename(path), [*index.left_out, *index.further]
            self.left_out += [(f"{shard}/{name}", f"{shard}/{name} {why}") for name, why in unused]
            if index.damage:
                self.left_out.append((shard, f"{path} {index.damage}: the rest is left out"))
            damage = f"damaged at {index.damaged_at}" if index.damage else ""
            contents.append(f"{shard} {index.fingerprint} {damage}")
        if not len(self):
            first = f" (first left out: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(
                f"webdataset:{place} has no sample with an image and a caption{first}: give shards "
                "of KEY.jpg and KEY.txt, or name the caption's key in KEY.json: ?caption_key=NAME"
            )
        further = sum(len(index.further) for index in self._indexes)  # members of listed samples
        self.listed = len(self) + len(self.left_out) - further
        self._fingerprint = digest(contents)
        self._files = Recent(_File, _MOST_OPEN)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        which, own = part_of(self._starts, index)
        image = self._read(which, own, *self._indexes[which].places[own, :2])
        return Record(image, self._captions(which, own), int(index))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._captions(*part_of(self._starts, index))

    def name(self, index: int) -> str:
        return self._name(*part_of(self._starts, index))

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
            raise self._changed(which, own)
        return captions

    def _read(self, which: int, own: int, start: int, size: int) -> bytes:
        """A part of a shard; raises UnreadableImage if it cannot be read or is no longer there."""
        try:
            content = self._files[self._paths[which]].read(int(start), int(size))
        except OSError as failure:
            raise UnreadableImage(f"{self._name(which, own)}: {failure.strerror}") from failure
        if len(content) < size:
            raise self._changed(which, own)
        return content

    def _changed(self, which: int, own: int) -> UnreadableImage:
        name = self._name(which, own)
        return UnreadableImage(f"{name}: the shard is not what it was at start")


def open_webdataset(request: Request) -> Shards:
    """`webdataset:PLACE`: a tar file, a folder of them, or a pattern (`{00000..00331}.tar`)."""
    paths, caption_key = shard_paths(request.place), request.keys["caption"]
    return Shards(request.place, paths, caption_key, damaged=request.settings.damaged_shards)


def shard_paths(place: str) -> list[str]:
    """The shards that a place names, sorted for a pattern or a folder.

    Shards named in full, also by ranges in braces, need not exist. A compressed shard is among them
    if it is not there unpacked: it is refused when it is indexed.
    """
    what = f"webdataset:{place}"
    if "://" in place or place.startswith("pipe:"):
        raise UserError(f"{what} is no path: download the shards and give their path")
    paths = []
    if os.path.isdir(place):
        names = dict.fromkeys(sorted(os.listdir(place)))
        packed = {
            name: f"{found[1]}.tar" for name in names if (found := _COMPRESSED.fullmatch(name))
        }
        shards = (n for n in names if n.endswith(".tar") or packed.get(n, n) not in names)
        paths = [os.path.join(place, name) for name in shards]
    for path in [] if os.path.isdir(place) else _unfolded(place):
        pattern = path if glob.has_magic(path) else glob.escape(path)
        found = [path] if os.path.exists(path) else sorted(glob.glob(pattern, recursive=True))
        if not found and path.endswith(".tar"):
            beside = sorted(glob.glob(f"{pattern[:-2]}*", recursive=True))
            found = [path for path in beside if _COMPRESSED.fullmatch(path)]
        paths += found or ([] if glob.has_magic(path) else [path])
    if not paths:
        cure = "a tar file, a folder of them, or a pattern: data/*.tar or data/{00000..00331}.tar"
        raise UserError(f"{what} names no .tar file: give the path of {cure}")
    return paths


def _unfolded(place: str) -> list[str]:
    """The paths that ranges {00..12} and lists {a,b} in braces expand to, as in a shell."""
    if os.path.exists(place):
        return [place]
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


def _indexed(paths: Sequence[str], caption_key: str | None, damaged: str) -> tuple[Index, ...]:
    """The index of each shard; raises UserError for the first damaged one if asked to refuse."""
    indexes = []
    with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
        found = pool.map(partial(index_shard, caption_key=caption_key), paths)
        for path, index in zip(paths, found, strict=True):
            if (index.damage or index.faults) and damaged == "refuse":
                pool.shutdown(cancel_futures=True)
                raise UserError(_refusal(path, index))
            indexes.append(index)
    return tuple(indexes)


def _refusal(path: str, index: Index) -> str:
    skip = "with --config.data.damaged_shards=skip"
    if index.damage.startswith("is compressed"):
        return f"{path} {index.damage}"
    if index.damage:
        return f"{path} {index.damage}: download it again, or leave the missing part out {skip}"
    more = f" (and {len(index.faults) - 1:,} more such samples)" if len(index.faults) > 1 else ""
    return (
        f"{path}: {index.faults[0]}{more}: pack the shard again with unique names and texts in "
        f"UTF-8, or leave such samples out {skip}"
    )


class _File:
    """An open file that several threads read from; closed when the last of them releases it."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._number, size, start)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it may never have been opened
            os.close(self._number)
