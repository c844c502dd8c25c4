"""Tar shards of samples, as written by img2dataset (WebDataset's format), read by index.

A sample is an image, KEY.jpg (or png, webp, gif, bmp), with its caption in KEY.txt, or under
"caption" in KEY.json. KEY is the whole name up to its last dot. Only headers and captions are read
when the source is opened (`tar_index`).
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
from codebook_jax.data.sources.tar_index import Index, captions_of, index_shard
from codebook_jax.errors import UserError

_INDEXING_THREADS = 4  # they mostly wait for the disk; more are slower
_MOST_OPEN = 128
_CHANGED = "the shard is not what it was at start"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards(NamedSource):
    """The samples of tar shards, in the order of the shards; files are opened on first use.

    The id of an image is the number of the record: the format has none. Samples without an image or
    a caption are left out and counted; damaged shards and samples with a duplicate member or a text
    not in UTF-8 are refused with UserError, or left out by damaged_shards="skip".
    """

    def __init__(self, request: Request) -> None:
        self.form, self.place, self._caption_key = (
            "webdataset",
            request.place,
            request.keys["caption"],
        )
        self._paths = shard_paths(self.place)
        self._indexes = _indexed(self._paths, self._caption_key, request.settings.damaged_shards)
        self._starts = np.cumsum([0, *(len(index.keys) for index in self._indexes)])
        self.left_out: list[tuple[str, str]] = []
        contents = ["webdataset 1", str(self._caption_key)]
        for path, index in zip(self._paths, self._indexes, strict=True):
            shard, damage = os.path.basename(path), ""
            self.left_out += [
                (f"{shard}/{key}", f"{shard}/{key} {why}") for key, why in index.left_out
            ]
            if index.damage:
                self.left_out.append((shard, f"{path} {index.damage}: the rest is left out"))
                damage = f"damaged at {index.damaged_at}"
            contents.append(f"{shard} {index.fingerprint} {damage}")
        if not len(self):
            first = f" (first left out: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(
                f"webdataset:{self.place} has no sample with an image and a caption{first}: give "
                "shards of KEY.jpg and KEY.txt, or name the caption's key in KEY.json: "
                "?caption_key=NAME"
            )
        self.listed = len(self) + len(self.left_out)
        self._fingerprint = digest(contents)
        self._files = Recent(partial(open, mode="rb", buffering=0), _MOST_OPEN)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        return Record(self._read(index, 0), self._captions(index), int(index))

    def captions(self, index: int) -> tuple[str, ...]:
        with required():
            return self._captions(index)

    def name(self, index: int) -> str:
        which, own = part_of(self._starts, index)
        return f"{os.path.basename(self._paths[which])}/{self._indexes[which].keys[own]}"

    def _captions(self, index: int) -> tuple[str, ...]:
        which, own = part_of(self._starts, index)
        content, captions = self._read(index, 2), ()
        key = (self._caption_key or "caption") if self._indexes[which].in_json[own] else None
        with contextlib.suppress(ValueError):
            captions = captions_of(content, key)
        if not captions:
            raise UnreadableImage(f"{self.name(index)}: {_CHANGED}")
        return captions

    def _read(self, index: int, part: int) -> bytes:
        """The image (`part` 0) or the caption (2) of a record."""
        which, own = part_of(self._starts, index)
        start, size = self._indexes[which].places[own, part : part + 2].tolist()
        try:
            file = self._files.open(self._paths[which])
            content = os.pread(file.fileno(), size, start)  # as several threads may
        except OSError as failure:
            raise UnreadableImage(f"{self.name(index)}: {failure.strerror}") from failure
        if len(content) < size:
            raise UnreadableImage(f"{self.name(index)}: {_CHANGED}")
        return content


def shard_paths(place: str) -> list[str]:
    """The shards that a place names, sorted for a pattern or a folder. Those named in full, also by
    ranges in braces, need not exist. Compressed ones not unpacked are refused when indexed.
    """
    what = f"webdataset:{place}"
    if "://" in place or place.startswith("pipe:"):
        raise UserError(f"{what} is no path: download the shards and give their path")
    paths, is_folder = [], os.path.isdir(place)
    for path in [os.path.join(glob.escape(place), "*.tar")] if is_folder else _unfolded(place):
        pattern = path if glob.has_magic(path) else glob.escape(path)
        found = [path] if os.path.exists(path) else sorted(glob.glob(pattern, recursive=True))
        if (is_folder or not found) and path.endswith(".tar"):
            compressed = f"{pattern}.*", f"{pattern[:-2]}[gbxz][zs]*"
            packed = sorted(path for each in compressed for path in glob.glob(each, recursive=True))
            found += [path for path in packed if f"{path[: path.rindex('.t')]}.tar" not in found]
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


def _indexed(paths: Sequence[str], caption_key: str | None, damaged: str) -> list[Index]:
    """The index of each shard; raises UserError for the first damaged one if asked to refuse."""
    indexes, skip = [], "with --config.data.damaged_shards=skip"
    with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
        found = pool.map(partial(index_shard, caption_key=caption_key), paths)
        for path, index in zip(paths, found, strict=True):
            if (index.damage or index.faults) and damaged == "refuse":
                pool.shutdown(cancel_futures=True)
                wrong, cure = f"{path} {index.damage}", ""
                if not index.damage.startswith("is compressed"):
                    cure = f": download or pack the shard again, or leave this part out {skip}"
                if not index.damage:
                    wrong = f"{path}: {index.faults[0]} ({len(index.faults):,} such faults)"
                raise UserError(wrong + cure)
            indexes.append(index)
    return indexes
