"""Tar shards of samples, as written by img2dataset (WebDataset's format), read by index.

A sample is an image, KEY.jpg (or png, webp, gif, bmp), with its caption in KEY.txt, or under
"caption" in KEY.json. KEY is the whole name up to its last dot. Only headers and captions are read
when the source is opened (`tar_index`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from codebook_jax.data.sources.record import Recent, Request, digest, part_of
from codebook_jax.data.sources.rows import Parts, Rows
from codebook_jax.data.sources.tar_index import Index, captions_of, index_shard
from codebook_jax.data.sources.texts import Texts
from codebook_jax.errors import UserError, first_few

_INDEXING_THREADS = 4  # they mostly wait for the disk; more are slower
_INDEXED_AT_ONCE = 64  # shards: indexes are large until they are packed into arrays
_MOST_OPEN = 128


class Shards(Rows):
    """The samples of tar shards, in the order of the shards; files are opened on first use.

    The id of an image is the number of the record: the format has none. Samples without an image or
    a caption are left out and counted; damaged shards and samples with a duplicate member or a text
    not in UTF-8 are refused with UserError, or left out by damaged_shards="skip".
    """

    _parts = Parts("image", "caption", None)

    def __init__(self, request: Request) -> None:
        self.form, self.place = request.scheme, request.place
        self._caption_key = request.keys["caption"]
        self._paths = shard_paths(self.place)
        self._keys, self.left_out, counts = Texts(), [], [0]
        contents, places, in_json = ["webdataset 1", str(self._caption_key)], [], []
        for path, index in _indexed(
            self._paths, self._caption_key, request.settings.damaged_shards
        ):
            shard, damage = os.path.basename(path), ""
            counts.append(len(index.keys))
            places.append(np.array(index.places, np.int64).reshape(-1, 4))
            in_json.append(np.array(index.in_json, bool))
            for key in index.keys:
                self._keys.append(key)
            for key, why in index.left_out:
                self.left_out.append((f"{shard}/{key}", f"{shard}/{key} {why}"))
            if index.damage:
                self.left_out.append((shard, f"{path} {index.damage}: the rest is left out"))
                damage = f"damaged at {index.damaged_at}"
            content = hashlib.sha256("\n".join(index.keys).encode())
            content.update(places[-1][:, 1::2].astype("<i8").tobytes() + in_json[-1].tobytes())
            contents.append(f"{shard} {content.hexdigest()} {damage}")
        self._count = len(self._keys)
        if not self._count:
            first = f" (first left out: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(
                f"webdataset:{self.place} has no sample with an image and a caption{first}: give "
                "shards of KEY.jpg and KEY.txt, or name the caption's key in KEY.json: "
                "?caption_key=NAME"
            )
        self._starts, self._places = np.cumsum(counts), np.concatenate(places)
        self._in_json = np.concatenate(in_json)
        self.listed = self._count + len(self.left_out)
        self._fingerprint = digest(contents)
        self._files = Recent(partial(open, mode="rb", buffering=0), _MOST_OPEN)

    def _place(self, row: int) -> str:
        which, _ = part_of(self._starts, row)
        return f"{os.path.basename(self._paths[which])}/{self._keys[row]}"

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        which, _ = part_of(self._starts, row)
        file = self._files.open(self._paths[which])
        image, image_size, text, text_size = self._places[row].tolist()
        # pread, since several threads may read the file
        key = (self._caption_key or "caption") if self._in_json[row] else None
        content = {"caption": captions_of(os.pread(file.fileno(), text_size, text), key)}
        if part == "image":
            content["image"] = os.pread(file.fileno(), image_size, image)
        if not content["caption"] or (part == "image" and len(content["image"]) < image_size):
            raise ValueError("the shard is not what it was at start")
        return content


def shard_paths(place: str) -> list[str]:
    """The shards that a place names, sorted for a pattern or a folder. Those named in full, also by
    ranges in braces, need not exist; compressed ones not unpacked are refused when indexed.
    """
    paths, folder = [], os.path.join(glob.escape(place), "*.tar")
    for path in [folder] if os.path.isdir(place) else _expanded(place):
        if os.path.exists(path) or not glob.has_magic(path):
            paths.append(path)
            continue
        found = set(glob.glob(path, recursive=True))
        packed = glob.glob(f"{path}.*", recursive=True) if path.endswith(".tar") else ()
        paths += sorted(found | {each for each in packed if os.path.splitext(each)[0] not in found})
    if not paths:
        cure = "a tar file, a folder of them, or a pattern: data/*.tar or data/{00000..00331}.tar"
        raise UserError(f"webdataset:{place} names no .tar file: give the path of {cure}")
    return paths


def _expanded(place: str) -> list[str]:
    """The paths that ranges {00..12} and lists {a,b} in braces expand to, as in a shell."""
    braces = re.search(r"\{([^{}]*)\}", place)
    if braces is None or os.path.exists(place):
        return [place]
    choices, bounds = braces[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if bounds:
        first, last = bounds.groups()
        width = max(len(first), len(last)) if first != "0" and first[0] == "0" else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    before, after = place[: braces.start()], place[braces.end() :]
    return [path for choice in choices for path in _expanded(f"{before}{choice}{after}")]


def _indexed(
    paths: Sequence[str], caption_key: str | None, damaged: str
) -> Iterator[tuple[str, Index]]:
    """Each shard with its index; raises UserError for the first damaged one if asked to refuse."""
    with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
        for start in range(0, len(paths), _INDEXED_AT_ONCE):
            some = paths[start : start + _INDEXED_AT_ONCE]
            found = pool.map(partial(index_shard, caption_key=caption_key), some)
            for path, index in zip(some, found, strict=True):
                wrong = index.damage
                if index.faults:
                    wrong = wrong or f"has damaged samples: {first_few(index.faults, 1)}"
                if wrong and damaged == "refuse":
                    pool.shutdown(cancel_futures=True)
                    raise UserError(
                        f"{path} {wrong}: download or pack the shard again, or leave this part out "
                        "with --config.data.damaged_shards=skip"
                    )
                yield path, index
