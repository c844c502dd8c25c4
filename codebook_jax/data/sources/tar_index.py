"""What is where in one tar shard of samples: found once by its headers, without reading the images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from codebook_jax.data.sources.texts import Packer, Texts
from codebook_jax.data.text import has_words

IMAGES = (b"jpg", b"jpeg", b"png", b"webp", b"gif", b"bmp")
_BLOCK = 512
_WINDOW = 8192  # at a time: of a sample all but its image
_FILES = (ord("0"), 0)  # the kinds of members that are files
_MORE = ord("x")  # ... and of what the header of the next one cannot hold
_CUT_SHORT = (tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError)


class Place(NamedTuple):
    """Where a member's content is in its shard."""

    start: int
    size: int


class Index(NamedTuple):
    """The samples of a shard that have an image and a caption."""

    keys: Texts
    places: np.ndarray  # int64 [samples, 4]: start and size of the image, of the caption
    in_json: np.ndarray  # bool [samples]: whether the caption stands in a JSON file
    left_out: list[tuple[str, str]]  # (key, why) of the others
    fingerprint: str  # of names and sizes
    damage: str  # where and how the shard ends before its end; empty: it does not


class Damaged(Exception):
    """Where and how a shard ends before its end, for "it ..."."""


class _Sample:
    """The members of one key."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.image: Place | None = None
        self.text: Place | None = None  # of a caption that has words
        self.json: Place | None = None


def index_shard(path: str, caption_key: str | None) -> Index:
    """The samples of the shard at `path`; with `caption_key`, captions are those that its JSON files have there.

    Raises OSError for a file that cannot be read.
    """
    keys, places, in_json = Packer(), array("q"), array("b")
    left_out, damage = [], ""
    with open(path, "rb") as file:
        window = _Window(file)
        samples = _samples(_members(window), window, texts=caption_key is None)
        while True:
            try:
                sample = next(samples, None)
            except Damaged as failure:
                damage = str(failure)
                break
            if sample is None:
                break
            why = _lacking(sample, window, caption_key)
            if why:
                left_out.append((sample.key.decode(errors="replace"), why))
                continue
            keys.add(sample.key.decode(errors="replace"))
            places.extend((*sample.image, *(sample.text or sample.json)))
            in_json.append(sample.text is None)
    packed = keys.texts()
    table = np.array(places, np.int64).reshape(-1, 4)
    content = hashlib.sha256("\n".join(packed).encode("utf-8", "surrogatepass"))
    content.update(table[:, 1::2].astype("<i8").tobytes() + in_json.tobytes())
    return Index(packed, table, np.array(in_json, bool), left_out, content.hexdigest(), damage)


def captions_of(content: bytes, key: str | None) -> tuple[str, ...]:
    """The captions, without those that have no words, that a text file (`key` None) or a JSON file at `key` holds."""
    if key is None:
        texts = [content.decode("utf-8", "replace").removeprefix("\ufeff")]
    else:
        try:
            held = json.loads(content)
        except (ValueError, RecursionError):
            return ()
        value = held.get(key) if isinstance(held, dict) else None
        texts = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return tuple(text for text in stripped if has_words(text))


def _lacking(sample: _Sample, window: _Window, caption_key: str | None) -> str:
    """Why a sample is left out; empty: it is not."""
    if sample.image is None:
        kinds = ", ".join(suffix.decode() for suffix in IMAGES)
        return f"has no image ({kinds})"
    if sample.text is not None:
        return ""
    key = caption_key or "caption"
    if sample.json is None:
        return "has no caption: " + (
            "no .json" if caption_key else "no text in a .txt, and no .json"
        )
    if not captions_of(window.read(*sample.json), key):
        return f"has no caption: no text under {key!r} in its .json"
    return ""


def _samples(
    members: Iterator[tuple[bytes, Place]], window: _Window, *, texts: bool
) -> Iterator[_Sample]:
    """Members side by side with the same path up to the first dot of the name are one sample.

    The last one before the damage of a shard may lack members, and is not given.
    """
    sample: _Sample | None = None
    for name, place in members:
        folder = name.rfind(b"/") + 1
        dot = name.find(b".", folder)
        if dot <= folder:  # no suffix, or a hidden file
            continue
        if sample is None or name[:dot] != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(name[:dot])
        suffix = name[dot + 1 :].lower()
        if suffix in IMAGES:
            sample.image = sample.image or place
        elif suffix == b"txt" and texts:
            # Now, while the window is here: it costs no further read.
            if captions_of(window.read(*place), None):
                sample.text = place
        elif suffix == b"json":
            sample.json = place
    if sample is not None:
        yield sample


def _members(window: _Window) -> Iterator[tuple[bytes, Place]]:
    """(name, place) of every file; raises Damaged.

    The standard library's reader takes ten times as long. It is asked for what few archives have: long names, links,
    sizes of gigabytes.
    """
    at, unusual = 0, None
    while True:
        head = window.read(at, _BLOCK)
        if head[:1] == b"\0" and head.count(0) == _BLOCK:
            return
        start, size = at + _BLOCK, _plain_size(head)
        kind = head[156] if size >= 0 else -1
        if kind == _MORE:
            more = window.read(start, size)
            if not (b"path=" in more or b"size=" in more or b"GNU.sparse" in more):
                at = start + _padded(size)
                continue
        elif kind in _FILES:
            name = head[:100].partition(b"\0")[0]
            at = _next(window, name, start, size)
            yield name, Place(start, size)
            continue
        unusual = unusual or _StandardReader(window)
        name, place, at = unusual.member(at)
        if name:
            yield name, place


def _plain_size(head: bytes) -> int:
    """The size that a header says; -1 where it is no header that needs nothing but its name and size read."""
    if head[257:262] != b"ustar" or head[345:346] != b"\0":
        return -1
    try:
        return int(head[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _next(window: _Window, name: bytes, start: int, size: int) -> int:
    """Where the header after a member is; raises Damaged where the file ends before."""
    if start + size > window.end:
        raise Damaged(f"ends inside {name.decode(errors='replace')}")
    return start + _padded(size)


class _StandardReader:
    """Members as Python's own reader sees them."""

    def __init__(self, window: _Window) -> None:
        self._window = window
        # Opened on an empty archive, for opening it on a damaged one fails.
        nothing = io.BytesIO(bytes(2 * _BLOCK))
        self._tar = tarfile.TarFile(fileobj=nothing, errors="surrogateescape")
        self._tar.fileobj = window.file

    def member(self, at: int) -> tuple[bytes, Place, int]:
        """(name, place, where the next header is) of the member whose header is at `at`; no name: it is no file."""
        self._window.file.seek(at)
        try:
            found = tarfile.TarInfo.fromtarfile(self._tar)
        except (tarfile.TarError, ValueError) as failure:
            raise Damaged(_reason(self._window, at, failure)) from failure
        if found.size < 0:
            raise Damaged(_reason(self._window, at, ValueError(f"size {found.size}")))
        name = b""
        if found.isreg() and not found.issparse():  # of holes a shard holds nothing
            name = found.name.encode("utf-8", "surrogateescape")
            _next(self._window, name, found.offset_data, found.size)
        return name, Place(found.offset_data, found.size), self._tar.offset


def _reason(window: _Window, at: int, failure: Exception) -> str:
    """What is said of a shard that has no header at `at`."""
    if window.end == 0:
        return "is empty"
    if window.read(0, 2) == b"\x1f\x8b":
        return "is compressed, and has to be unpacked with gunzip to be read in any order"
    if at >= window.end:
        return "ends without the end mark of an archive"
    if at + _BLOCK > window.end or isinstance(failure, _CUT_SHORT):
        return "ends inside a header"
    return f"is no tar file from byte {at:,} on ({failure})"


class _Window:
    """Reads small parts of a file, each near the one before."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, os.fstat(file.fileno()).st_size
        self._start, self._held = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """The bytes there; fewer where the file ends before."""
        at = start - self._start
        if at < 0 or at + size > len(self._held):
            self._start, at = start, 0
            self._held = os.pread(self.file.fileno(), max(size, _WINDOW), start)
        return self._held[at : at + size]
