"""Tar shards of samples, as written by img2dataset (WebDataset's format), read by index.

A sample is an image, KEY.jpg (or png, webp, gif, bmp), with its caption in KEY.txt, or under
"caption" in KEY.json. KEY is the whole name up to its last dot. Opening reads headers and captions
alone. The index made of them is kept in `.tar_index` beside the shard or, if nothing can be written
there, in the user's cache, and used while the shard has the same size and modification time.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources.record import NO_CAPTION, Request, digest, part_of
from codebook_jax.data.sources.rows import Parts, Rows, texts_in
from codebook_jax.data.sources.texts import Texts, not_utf8
from codebook_jax.errors import UserError, first_few
from codebook_jax.files import parse_json, written_whole

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_UNPACKS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKED = re.compile(r"\.(tar\.|t)(gz|bz2|xz|zst)$")
_FORM = 1  # of the kept index; a new number where what counts as a sample or a caption changes
_SETTLED_NS = 2_000_000_000  # a shard changed more recently may be changed again in the same tick
_BLOCK = tarfile.BLOCKSIZE
_MATTERS = re.compile(b"path=|size=|GNU.sparse")  # in an extended header
_OWNER = re.compile(r"(?:.*/)?[^./]*", re.DOTALL)  # WebDataset's key, up to the first dot
_Member = tuple[str, int, int]  # (suffix, start, size); size -1 for a link or a sparse file
_INDEXING_THREADS = 4  # they mostly wait for the disk; more are slower
_INDEXED_AT_ONCE = 64  # shards: indexes are large until they are packed into arrays
_MOST_OPEN = 128


class Shards(Rows):
    """The samples of tar shards, in the order of the shards; files are opened on first use.

    The id of an image is the number of the record. Samples without an image or a caption are left
    out and counted; damaged shards and samples with a duplicate member or a text not in UTF-8 are
    refused, or left out by damaged_shards="skip".
    """

    _parts = Parts("image", "caption", None)

    def __init__(self, request: Request) -> None:
        self.form, self.place = request.scheme, request.place
        self._caption_key = request.keys["caption"]
        self._paths = shard_paths(self.place)
        self._keys, self.left_out, starts = Texts(), [], [0]
        contents, samples = ["webdataset 1", str(self._caption_key)], []
        damaged = request.settings.damaged_shards
        for path, index in _indexed(self._paths, self._caption_key, damaged):
            shard, damage = os.path.basename(path), ""
            places = np.array(index.places, np.int64).reshape(-1, 4)
            samples.append(np.column_stack([places, np.array(index.in_json, np.int64)]))
            for key in index.keys:
                self._keys.append(key)
            starts.append(len(self._keys))
            for key, why in index.left_out:
                self.left_out.append((f"{shard}/{key}", f"{shard}/{key} {why}"))
            if index.damage:
                self.left_out.append((shard, f"{path} {index.damage}: the rest is left out"))
                damage = f"damaged at {index.damaged_at}"
            content = hashlib.sha256("\n".join(index.keys).encode())
            content.update(places[:, 1::2].astype("<i8").tobytes() + bytes(index.in_json))
            contents.append(f"{shard} {content.hexdigest()} {damage}")
        self._count = len(self._keys)
        if not self._count:
            first = f" (first left out: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(
                f"webdataset:{self.place} has no sample with an image and a caption{first}: give "
                "shards of KEY.jpg and KEY.txt, or name the caption's key in KEY.json: "
                "?caption_key=NAME"
            )
        self._starts, self._samples = np.array(starts), np.concatenate(samples)
        self.listed = self._count + len(self.left_out)
        self._fingerprint = digest(contents)

    def _place(self, row: int) -> str:
        which, _ = part_of(self._starts, row)
        return f"{os.path.basename(self._paths[which])}/{self._keys[row]}"

    def _read(self, row: int, part: str) -> Mapping[str, Any]:
        which, _ = part_of(self._starts, row)
        file = _opened(self._paths[which], self._fingerprint)
        image, image_size, text, text_size, in_json = self._samples[row].tolist()
        # pread, since several threads may read the file
        key = (self._caption_key or "caption") if in_json else None
        content = {"caption": captions_of(os.pread(file.fileno(), text_size, text), key)}
        if part == "image":
            content["image"] = os.pread(file.fileno(), image_size, image)
        if not content["caption"] or (part == "image" and len(content["image"]) < image_size):
            raise UnreadableImage("the shard is not what it was at start")
        return content


@functools.lru_cache(_MOST_OPEN)
def _opened(path: str, source: str) -> BinaryIO:
    """A file of a source with this fingerprint; it closes when the last thread is done with it."""
    return open(path, "rb", buffering=0)


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
        packed = glob.glob(f"{path[:-2]}*", recursive=True) if path.endswith(".tar") else ()
        packed = {each for each in packed if _PACKED.search(each)}
        paths += sorted(found | {each for each in packed if _PACKED.sub(".tar", each) not in found})
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


def _indexed(paths: Sequence[str], key: str | None, damaged: str) -> Iterator[tuple[str, Index]]:
    """Each shard with its index; raises UserError for the first damaged one if asked to refuse."""
    with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
        for start in range(0, len(paths), _INDEXED_AT_ONCE):
            some = paths[start : start + _INDEXED_AT_ONCE]
            found = pool.map(functools.partial(index_shard, caption_key=key), some)
            for path, index in zip(some, found, strict=True):
                wrong = [why for why in (index.damage, *index.faults) if why]
                if wrong and damaged == "refuse":
                    pool.shutdown(cancel_futures=True)
                    raise UserError(
                        f"{path}: {first_few(wrong, 1)}: download or pack the shard again, or "
                        "leave this part out with --config.data.damaged_shards=skip"
                    )
                yield path, index


class Index(NamedTuple):
    """The samples of a shard that have an image and a caption, as kept in JSON."""

    keys: Sequence[str] = ()
    places: Sequence[Sequence[int]] = ()  # start and size of each image, and of its caption
    in_json: Sequence[bool] = ()  # whether the caption is in a JSON file
    left_out: Sequence[tuple[str, str]] = ()  # (key, why) of the other samples
    faults: Sequence[str] = ()  # duplicate members, or texts not in UTF-8; these samples are out
    damage: str = ""  # how the shard is truncated or damaged; empty if it is not
    damaged_at: int = 0  # the byte from which it cannot be read


class _NoPairError(Exception):
    """(why a sample is no pair, whether that is a fault of the shard)"""


def index_shard(path: str, caption_key: str | None) -> Index:
    """The index kept for the shard at `path`, or a new one, which is then kept.

    With `caption_key`, captions are the values at that key of its JSON files. An image or text
    without a partner is left out, unless it belongs to the sample named before its first dot, as in
    WebDataset (0001.seg.png to 0001).
    """
    folder, name = os.path.split(os.path.abspath(path))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [  # beside the shard, whose folder may have another name on another host, or the cache
        Path(place, ".tar_index", f"{name}.{digest([where, str(caption_key)])[:12]}.json")
        for place, where in ((folder, ""), (os.path.join(cache, "codebook_jax"), folder))
    ]
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            version = [_FORM, state.st_size, state.st_mtime_ns]
            for place in places:
                with contextlib.suppress(Exception):  # there is none, or something else
                    kept = parse_json(place.read_text(encoding="utf-8"))
                    if kept["version"] == version:
                        return Index(*(kept["index"][name] for name in Index._fields))
            index = _read_shard(file, caption_key)
    except OSError as failure:
        return Index(damage=f"cannot be read ({failure.strerror})")
    if not index.damage and time.time_ns() - state.st_mtime_ns > _SETTLED_NS:
        for place in places:
            with contextlib.suppress(OSError, UserError), written_whole(place) as file:
                file.write(json.dumps({"version": version, "index": index._asdict()}))
                break
    return index


def captions_of(content: bytes, key: str | None) -> tuple[str, ...]:
    """The captions with words of a text file (`key` None), or at `key` of a JSON file; raises
    ValueError if the text is not UTF-8, or not JSON.
    """
    if key is None:
        return texts_in(content.decode("utf-8-sig"))
    held = parse_json(content)
    value = held.get(key) if isinstance(held, dict) else None
    texts = value if isinstance(value, list) else [value]
    return texts_in([text for text in texts if isinstance(text, str)])


def _read_shard(file: BinaryIO, caption_key: str | None) -> Index:
    """The index of a shard, from the headers and the captions."""
    samples: dict[str, list[_Member]] = {}
    stem, damage, damaged_at = "", "", 0
    try:
        for name, start, size in _files_in(file):
            if name.find(".", name.rfind("/") + 1) > name.rfind("/") + 1:  # neither bare nor hidden
                stem, _, suffix = name.rpartition(".")
                samples.setdefault(stem, []).append((suffix, start, size))
    except tarfile.ReadError as failure:
        damage, damaged_at = failure.args
        samples.pop(stem, None)  # its other members may be cut off, so it is not counted
    keys, places, in_json, lacking, faults = [], [], [], {}, []
    for key, members in samples.items():
        try:
            place, is_json = _pair(file, members, caption_key)
        except _NoPairError as failure:
            lacking[key], is_fault = failure.args
            faults += [f"{_printable(key)} {lacking[key]}"] if is_fault else []
            continue
        keys.append(_printable(key))
        places.append(place)
        in_json.append(is_json)
    left_out = [
        (_printable(key), why)
        for key, why in lacking.items()
        if (owner := _OWNER.match(key)[0]) not in samples or owner in lacking
    ]
    return Index(keys, places, in_json, left_out, faults, damage, damaged_at)


def _pair(
    file: BinaryIO, members: Sequence[_Member], caption_key: str | None
) -> tuple[list[int], bool]:
    """([start and size of the image, of the caption], whether the caption is in JSON)."""
    images, texts, jsons = (
        [member for member in members if member[0].lower() in suffixes and member[2] >= 0]
        for suffixes in (IMAGES, () if caption_key else ("txt",), ("json",))
    )
    suffixes = [suffix for suffix, _, _ in (*images, *texts, *jsons)]
    for suffix in suffixes:
        if suffixes.count(suffix) > 1:
            raise _NoPairError(f"has {suffix} more than once", True)
    json_key = caption_key or "caption"
    why = f"{NO_CAPTION} in a .txt, nor under {json_key!r} in a .json"
    if not images:
        why = f"has no image ({', '.join(IMAGES)})"
    for suffix, start, size in (*texts, *jsons) if images else ():
        is_json = suffix.lower() == "json"
        file.seek(start)
        try:
            if captions_of(file.read(size), json_key if is_json else None):
                return [*images[0][1:], start, size], is_json
        except ValueError as failure:
            if not is_json:
                why = f"cannot be used: its {suffix} {not_utf8(failure)}"
                raise _NoPairError(why, True) from failure
            why = f"{NO_CAPTION}: its .json cannot be read ({failure})"
    if any(size < 0 for _, _, size in members):
        why += ", only a link or a sparse file, whose content is not in the shard"
    raise _NoPairError(why, False)


def _printable(name: str) -> str:
    """A name whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")


def _files_in(file: BinaryIO) -> Iterator[_Member]:
    """(name, start, size) of every file, with size -1 for a link or a sparse file; raises
    tarfile.ReadError(how the shard is damaged, at which byte).

    Plain headers are read here, the others by the standard library, which takes ten times as long.
    """
    end, following = os.fstat(file.fileno()).st_size, 0
    # Opened on an empty archive, since opening a damaged one fails.
    nothing = io.BytesIO(bytes(2 * _BLOCK))
    tar = tarfile.TarFile(fileobj=nothing, encoding="utf-8", errors="surrogateescape")
    tar.fileobj = file
    while True:
        here = following
        file.seek(here)
        head = file.read(_BLOCK)
        start, size, kind = here + _BLOCK, -1, head[156:157]
        if head[257:262] == b"ustar" and head[345:346] == b"\0":  # no further part of the name
            with contextlib.suppress(ValueError):
                size = int(head[124:136].rstrip(b"\0 ") or b"0", 8)
        following = start + -(-size // _BLOCK) * _BLOCK
        if size >= 0 and kind == b"x" and not _MATTERS.search(file.read(size)):
            continue  # extends the next header
        if size >= 0 and kind in (b"0", b"\0"):
            name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        else:
            file.seek(here)
            member = _standard_member(tar, here)
            if member is None:
                return
            name, start, size, following = member.name, member.offset_data, member.size, tar.offset
            if member.issparse() or member.islnk() or member.issym():
                size = -1
            elif not member.isreg():
                continue
        if start + size > end:
            raise tarfile.ReadError(f"ends inside {_printable(name)}", here)
        yield name, start, size


def _standard_member(tar: tarfile.TarFile, here: int) -> tarfile.TarInfo | None:
    """The member whose header is `here`, or None at the end mark."""
    why = f"is cut short, damaged or no tar file: no header or end mark at byte {here:,}"
    try:
        member = tarfile.TarInfo.fromtarfile(tar)
        if member.size >= 0:
            return member
    except tarfile.EOFHeaderError:
        if not any(tar.fileobj.read(2 * tarfile.RECORDSIZE)):  # padded to a whole record
            return None
        why = (
            f"goes on behind the end mark of an archive at byte {here:,}, as where cat has joined "
            "several (tar -A joins them whole)"
        )
    except (tarfile.TarError, ValueError):
        tar.fileobj.seek(0)
        first = tar.fileobj.read(6)
        for tool in [tool for magic, tool in _UNPACKS.items() if first.startswith(magic)]:
            if not here:
                why = f"is compressed (`{tool} -dc FILE > NAME.tar` unpacks it)"
    raise tarfile.ReadError(why, here)
