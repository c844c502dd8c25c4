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
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from codebook_jax.data.sources.record import digest
from codebook_jax.data.sources.texts import Packer, Texts, not_utf8
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, written_whole

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
COMPRESSED = {  # end of the name -> (first bytes of the file, program that unpacks it)
    "gz": (b"\x1f\x8b", "gzip"),
    "bz2": (b"BZh", "bzip2"),
    "xz": (b"\xfd7zXZ\0", "xz"),
    "zst": (b"\x28\xb5\x2f\xfd", "zstd"),
}
FOLDER = ".tar_index"
_FORM = 1  # of the kept index; a new number where what counts as a sample or a caption changes
_SETTLED_NS = 2_000_000_000  # a shard changed more recently may be changed again in the same tick
_BLOCK = tarfile.BLOCKSIZE
_LINK = ", only a link or a sparse file, whose content is not in the shard"
_CUT_SHORT = (tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError)


class Index(NamedTuple):
    """The samples of a shard that have an image and a caption."""

    keys: Texts
    places: np.ndarray  # int64 [samples, 4]: start and size of the image, of the caption
    in_json: np.ndarray  # bool [samples]: whether the caption is in a JSON file
    fingerprint: str  # of names and sizes
    left_out: Sequence[tuple[str, str]] = ()  # (key, why) of the other samples
    further: Sequence[tuple[str, str]] = ()  # (member, why) of further images and texts of samples
    faults: Sequence[str] = ()  # duplicate members, or texts not in UTF-8; these samples are out
    damage: str = ""  # how the shard is truncated or damaged; empty if it is not
    damaged_at: int = 0  # the byte from which it cannot be read


class _Damaged(Exception):
    """How a shard is truncated or damaged, a predicate such as "is empty"; and at which byte."""


class _Member(NamedTuple):
    suffix: str
    start: int
    size: int  # -1 for a link or a sparse file
    kind: str  # image, json, text with a caption, blank text, encoded (text not in UTF-8), other
    fault: str = ""  # of an encoded text


def index_shard(path: str, caption_key: str | None) -> Index:
    """The index kept for the shard at `path`, or a new one, which is then kept.

    With `caption_key`, captions are the values at that key of its JSON files. An image or text
    without a partner is a further member of the sample named before its first dot, as in WebDataset
    (0001.seg.png of 0001), or left out if there is no such sample.
    """
    places = _places_of_index(path, caption_key)
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
        held = parse_json(content, of_data=True)
        value = held.get(key) if isinstance(held, dict) else None
        texts = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if has_words(text))


def unpacking(tool: str) -> str:
    """What to do about a shard compressed with `tool`."""
    return f"unpack it with `{tool} -dc FILE > NAME.tar`, for images are read in no order"


def _places_of_index(path: str, caption_key: str | None) -> list[Path]:
    """Beside the shard, whose folder may have another name on another host; or in the cache."""
    folder, name = os.path.split(os.path.abspath(path))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [
        Path(place, FOLDER, f"{name}.{digest([where, str(caption_key)])[:12]}.json")
        for place, where in ((folder, ""), (os.path.join(cache, "codebook_jax"), folder))
    ]


def _index_of(
    keys: Sequence[str] = (), places: Sequence = (), in_json: Sequence[bool] = (), **others: Any
) -> Index:
    """An index from its JSON form."""
    packed = Packer()
    for key in keys:
        packed.add(key)
    table, flags = np.array(places, np.int64).reshape(-1, 4), np.array(in_json, bool)
    content = hashlib.sha256("\n".join(keys).encode("utf-8"))
    content.update(table[:, 1::2].astype("<i8").tobytes() + flags.tobytes())
    return Index(packed.texts(), table, flags, content.hexdigest(), **others)


def _read_shard(file: BinaryIO, caption_key: str | None) -> dict[str, Any]:
    """The index of a shard in its JSON form, from the headers and the captions."""
    samples: dict[str, list[_Member]] = {}
    stem, damage, damaged_at = "", "", 0
    try:
        for name, start, size in _files_in(file):
            if name.find(".", name.rfind("/") + 1) > name.rfind("/") + 1:  # neither bare nor hidden
                stem, _, suffix = name.rpartition(".")
                member = _member(file, suffix, start, size, texts=caption_key is None)
                samples.setdefault(stem, []).append(member)
    except _Damaged as failure:
        damage, damaged_at = failure.args
    keys, places, in_json, lacking, faults = [], [], [], {}, []
    further: list[tuple[str, _Member]] = []
    for key, members in samples.items():
        first = {member.kind: member for member in reversed(members)}
        image, caption = first.get("image"), first.get("text") or first.get("json")
        if damage and key == stem:
            lacking[key] = ""  # its other members may be cut off, so it is not counted
        elif fault := _fault(members, first):
            faults.append(f"{_printable(key)}.{fault}")
            lacking[key] = f"cannot be used: {faults[-1]}"
        elif why := _lack(file, caption_key, first):
            lacking[key] = why + _LINK * any(member.size < 0 for member in members)
        else:
            keys.append(_printable(key))
            places.append([image.start, image.size, caption.start, caption.size])
            in_json.append(caption.kind == "json")
            further += [(key, member) for member in members if member not in (image, caption)]
    whole = samples.keys() - lacking.keys()
    owned = {key for key in lacking if _owner(key) in whole}
    further += [(key, member) for key in owned for member in samples[key]]
    left_out = [(_printable(key), why) for key, why in lacking.items() if why and key not in owned]
    index = {"keys": keys, "places": places, "in_json": in_json, "left_out": left_out}
    index |= {"further": _counted(further), "faults": faults}
    return index | {"damage": damage, "damaged_at": damaged_at}


def _member(file: BinaryIO, suffix: str, start: int, size: int, *, texts: bool) -> _Member:
    kind, fault = "other", ""
    if size >= 0 and suffix.lower() in IMAGES:
        kind = "image"
    elif size >= 0 and suffix.lower() == "json":
        kind = "json"
    elif size >= 0 and suffix.lower() == "txt" and texts:
        file.seek(start)
        try:
            kind = "text" if captions_of(file.read(size), None) else "blank"
        except UnicodeDecodeError as failure:
            kind, fault = "encoded", not_utf8(failure)
    return _Member(suffix, start, size, kind, fault)


def _fault(members: list[_Member], first: dict[str, _Member]) -> str:
    """A duplicate name of a sample's members, or that its only text is not UTF-8; empty if fine."""
    suffixes = [member.suffix for member in members]
    if len({*suffixes}) < len(suffixes):
        for member in members:
            if member.kind != "other" and suffixes.count(member.suffix) > 1:
                return f"{member.suffix} occurs more than once"
    if "encoded" in first and "image" in first and "text" not in first:
        return f"{first['encoded'].suffix} {first['encoded'].fault}"
    return ""


def _lack(file: BinaryIO, caption_key: str | None, first: dict[str, _Member]) -> str:
    """Why the first members of each kind are no pair; empty if they are."""
    if "image" not in first:
        return f"has no image ({', '.join(IMAGES)})"
    if "text" in first:
        return ""
    if "json" not in first:
        return f"has no caption: no {'.json' if caption_key else 'text in a .txt, and no .json'}"
    file.seek(first["json"].start)
    try:
        if captions_of(file.read(first["json"].size), caption_key or "caption"):
            return ""
    except ValueError as failure:
        return f"has no caption: its .json cannot be read ({failure})"
    return f"has no caption: no text under {caption_key or 'caption'!r} in its .json"


def _counted(further: list[tuple[str, _Member]]) -> list[tuple[str, str]]:
    """(member, why) of the first image or text of each suffix that is no part of a pair."""
    counts: dict[str, tuple[str, int]] = {}
    for key, member in sorted(further, key=lambda item: item[1].start):
        if member.kind in ("image", "text"):
            owner = _printable(_owner(key))
            suffix = f"{_printable(key)[len(owner) :]}.{member.suffix}"
            first, count = counts.get(suffix, (owner, 0))
            counts[suffix] = first, count + 1
    why = "is not a pair but a further member of {}, like {:,} *{} here"
    return [
        (owner + suffix, why.format(owner, count, suffix))
        for suffix, (owner, count) in counts.items()
    ]


def _owner(key: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the name."""
    folder = key.rfind("/") + 1
    return key[:folder] + key[folder:].partition(".")[0]


def _printable(name: str) -> str:
    """A name whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode(errors="replace")


def _files_in(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of every file, with size -1 for a link or a sparse file; raises _Damaged.

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
        start, size = here + _BLOCK, _plain_size(head)
        kind, following = head[156:157] if size >= 0 else b"", start + -(-size // _BLOCK) * _BLOCK
        if kind == b"x":  # extends the next header
            more = file.read(size)
            if not (b"path=" in more or b"size=" in more or b"GNU.sparse" in more):
                continue
        if kind in (b"0", b"\0"):
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
            raise _Damaged(f"ends inside {_printable(name)}", here)
        yield name, start, size


def _plain_size(head: bytes) -> int:
    """The size in a plain header; -1 if reading it takes more than its name and size."""
    if head[257:262] != b"ustar" or head[345:346] != b"\0":
        return -1
    try:
        return int(head[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _standard_member(tar: tarfile.TarFile, here: int, end: int) -> tarfile.TarInfo | None:
    """The member whose header is `here`, or None at the end mark; raises _Damaged."""
    try:
        member = tarfile.TarInfo.fromtarfile(tar)
        if member.size >= 0:
            return member
        failure = ValueError(f"size {member.size}")
    except tarfile.EOFHeaderError:
        rest = tar.fileobj.read(2 * tarfile.RECORDSIZE)  # padded to a whole record
        if not any(rest):
            return None
        raise _Damaged(
            f"goes on behind the end mark of an archive at byte {here:,}, as where cat has joined "
            "several (tar -A joins them whole)",
            here,
        ) from None
    except (tarfile.TarError, ValueError) as error:
        failure = error
    tar.fileobj.seek(0)
    start = tar.fileobj.read(6)
    why = f"is no tar file from byte {here:,} on ({failure})"
    if here + _BLOCK > end or isinstance(failure, _CUT_SHORT):
        why = "ends inside a header" if here < end else "ends without the end mark of an archive"
    for magic, tool in COMPRESSED.values():
        if start.startswith(magic):
            why = f"is compressed: {unpacking(tool)}"
    raise _Damaged(why if end else "is empty", here) from failure
