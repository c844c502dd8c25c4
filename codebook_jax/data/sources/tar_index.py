"""The index of one tar shard: where each sample is, from the headers, without reading the images.

It is kept in `.tar_index` beside the shard, or, if nothing can be written there, in the user's
cache, and used again while the shard has the same size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from codebook_jax.data.sources.record import digest
from codebook_jax.data.sources.texts import Texts, not_utf8
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, written_whole

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_UNPACKS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FORM = 1  # of the kept index; a new number where what counts as a sample or a caption changes
_SETTLED_NS = 2_000_000_000  # a shard changed more recently may be changed again in the same tick
_BLOCK = tarfile.BLOCKSIZE
_MATTERS = re.compile(b"path=|size=|GNU.sparse")  # in an extended header
_Member = tuple[str, int, int]  # (suffix, start, size); size -1 for a link or a sparse file


class Index(NamedTuple):
    """The samples of a shard that have an image and a caption."""

    keys: Texts
    places: np.ndarray  # int64 [samples, 4]: start and size of the image, of the caption
    in_json: np.ndarray  # bool [samples]: whether the caption is in a JSON file
    fingerprint: str  # of names and sizes
    left_out: Sequence[tuple[str, str]] = ()  # (key, why) of the other samples
    faults: Sequence[str] = ()  # duplicate members, or texts not in UTF-8; these samples are out
    damage: str = ""  # how the shard is truncated or damaged; empty if it is not
    damaged_at: int = 0  # the byte from which it cannot be read


class _DamagedError(Exception):
    """(how a shard is truncated or damaged, at which byte)"""


class _NoPairError(Exception):
    """(why a sample is no pair, the fault in it, if that is the reason)"""


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
                        return _index_of(**kept["index"])
            content = _read_shard(file, caption_key)
    except OSError as failure:
        return _index_of(damage=f"cannot be read ({failure.strerror})")
    if not content["damage"] and time.time_ns() - state.st_mtime_ns > _SETTLED_NS:
        for place in places:
            with contextlib.suppress(OSError, UserError), written_whole(place) as file:
                file.write(json.dumps({"version": version, "index": content}))
                break
    return _index_of(**content)


def captions_of(content: bytes, key: str | None) -> tuple[str, ...]:
    """The captions with words of a text file (`key` None), or at `key` of a JSON file; raises
    ValueError if the text is not UTF-8, or not JSON.
    """
    if key is None:
        texts = [content.decode("utf-8-sig")]
    else:
        held = parse_json(content)
        value = held.get(key) if isinstance(held, dict) else None
        texts = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return tuple(filter(has_words, stripped))


def _index_of(
    keys: Sequence[str] = (), places: Sequence = (), in_json: Sequence[bool] = (), **others: Any
) -> Index:
    """An index from its JSON form."""
    others.pop("further", None)  # older versions kept it
    table, flags = np.array(places, np.int64).reshape(-1, 4), np.array(in_json, bool)
    content = hashlib.sha256("\n".join(keys).encode("utf-8"))
    content.update(table[:, 1::2].astype("<i8").tobytes() + flags.tobytes())
    return Index(Texts(keys), table, flags, content.hexdigest(), **others)


def _read_shard(file: BinaryIO, caption_key: str | None) -> dict[str, Any]:
    """The index of a shard in its JSON form, from the headers and the captions."""
    samples: dict[str, list[_Member]] = {}
    stem, damage, damaged_at = "", "", 0
    try:
        for name, start, size in _files_in(file):
            if name.find(".", name.rfind("/") + 1) > name.rfind("/") + 1:  # neither bare nor hidden
                stem, _, suffix = name.rpartition(".")
                samples.setdefault(stem, []).append((suffix, start, size))
    except _DamagedError as failure:
        damage, damaged_at = failure.args
        samples.pop(stem, None)  # its other members may be cut off, so it is not counted
    keys, places, in_json, lacking, faults = [], [], [], {}, []
    for key, members in samples.items():
        try:
            place, is_json = _pair(file, members, caption_key)
        except _NoPairError as failure:
            lacking[key], fault = failure.args
            if fault:
                faults.append(f"{_printable(key)}.{fault}")
                lacking[key] = f"cannot be used: {faults[-1]}"
            continue
        keys.append(_printable(key))
        places.append(place)
        in_json.append(is_json)
    left_out = [
        (_printable(key), why)
        for key, why in lacking.items()
        if (owner := _owner(key)) not in samples or owner in lacking
    ]
    index = {"keys": keys, "places": places, "in_json": in_json, "left_out": left_out}
    return index | {"faults": faults, "damage": damage, "damaged_at": damaged_at}


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
            raise _NoPairError("", f"{suffix} occurs more than once")
    why = f"has no image ({', '.join(IMAGES)})"
    fault = ""
    for suffix, start, size in texts if images else ():
        file.seek(start)
        try:
            if captions_of(file.read(size), None):
                return [*images[0][1:], start, size], False
        except UnicodeDecodeError as failure:
            fault = fault or f"{suffix} {not_utf8(failure)}"
    if images:
        why = f"has no caption: no {'.json' if caption_key else 'text in a .txt, and no .json'}"
    for _, start, size in jsons[:1] if images and not fault else ():
        file.seek(start)
        why = f"has no caption: no text under {caption_key or 'caption'!r} in its .json"
        try:
            if captions_of(file.read(size), caption_key or "caption"):
                return [*images[0][1:], start, size], True
        except ValueError as failure:
            why = f"has no caption: its .json cannot be read ({failure})"
    if any(size < 0 for _, _, size in members):
        why += ", only a link or a sparse file, whose content is not in the shard"
    raise _NoPairError(why, fault)


def _owner(key: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the name."""
    folder = key.rfind("/") + 1
    return key[:folder] + key[folder:].partition(".")[0]


def _printable(name: str) -> str:
    """A name whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")


def _files_in(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of every file, with size -1 for a link or a sparse file.

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
            member = _standard_member(tar, here, end)
            if member is None:
                return
            name, start, size, following = member.name, member.offset_data, member.size, tar.offset
            if member.issparse() or member.islnk() or member.issym():
                size = -1
            elif not member.isreg():
                continue
        if start + size > end:
            raise _DamagedError(f"ends inside {_printable(name)}", here)
        yield name, start, size


def _standard_member(tar: tarfile.TarFile, here: int, end: int) -> tarfile.TarInfo | None:
    """The member whose header is `here`, or None at the end mark; raises _DamagedError."""
    why = f"is no tar file from byte {here:,} on"
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
    except (tarfile.TarError, ValueError) as failure:
        truncated = (tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError)
        if here + _BLOCK > end or isinstance(failure, truncated):
            why = "ends without the end mark of an archive"
    tar.fileobj.seek(0)
    start = tar.fileobj.read(6)
    for magic, tool in _UNPACKS.items():
        if start.startswith(magic) and not here:
            unpack = f"unpack it with `{tool} -dc FILE > NAME.tar`"
            why = f"is compressed: {unpack}, for images are read in no order"
    raise _DamagedError(why, here)
