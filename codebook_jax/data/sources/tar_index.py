"""The index of one tar shard: where each sample is, from the headers, without reading the
images.
"""

from __future__ import annotations

import enum
import hashlib
import io
import os
import tarfile
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from codebook_jax.data.sources.texts import Packer, Texts, not_utf8, numbered
from codebook_jax.data.text import has_words
from codebook_jax.files import parse_json

IMAGES = (b"jpg", b"jpeg", b"png", b"webp", b"gif", b"bmp")
COMPRESSED = {  # end of the name -> (first bytes of the file, program that unpacks it)
    "gz": (b"\x1f\x8b", "gzip"),
    "bz2": (b"BZh", "bzip2"),
    "xz": (b"\xfd7zXZ\0", "xz"),
    "zst": (b"\x28\xb5\x2f\xfd", "zstd"),
}
_BLOCK = 512
_WINDOW = 8192  # bytes read at a time: all of a sample but its image
_FILES = (ord("0"), 0)  # types of members that are files
_MORE = ord("x")  # type of a member that extends the next header
_CUT_SHORT = (tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError)


class Place(NamedTuple):
    """The position of a member's content in its shard."""

    start: int
    size: int


class Index(NamedTuple):
    """The samples of a shard that have an image and a caption."""

    keys: Texts
    places: np.ndarray  # int64 [samples, 4]: start and size of the image, of the caption
    in_json: np.ndarray  # bool [samples]: whether the caption is in a JSON file
    left_out: list[tuple[str, str]]  # (key, why) of the others
    further: list[tuple[str, str]]  # (member, why) of further images and texts of samples
    faults: list[str]  # duplicate members, or texts not in UTF-8; their samples are left out
    fingerprint: str  # of names and sizes
    damage: str  # where and how the shard is truncated or damaged; empty if it is not


class Damaged(Exception):
    """Where and how a shard is truncated or damaged; the message is a predicate, such as "is
    empty".
    """


class _Kind(enum.IntEnum):
    """The role of a member in a sample."""

    OTHER = 0
    IMAGE = 1
    TEXT = 2  # with a caption
    JSON = 3
    BLANK = 4  # a text without a caption
    ENCODED = 5  # a text that is not UTF-8


class _Members(NamedTuple):
    """The members of a shard, as arrays, not objects: a file may hold millions."""

    names: Texts
    places: np.ndarray  # int64 [members, 2]: start and size
    kinds: np.ndarray  # int8 [members], of _Kind
    hashes: np.ndarray  # int64 [members], of the names
    stems: np.ndarray  # int64 [members], of the names up to the last dot


class _Samples(NamedTuple):
    """Members with the same name up to the last dot are one sample; -1 if it has none of a kind."""

    first: np.ndarray  # int64 [samples], the first member of each
    which: np.ndarray  # int32 [members], the sample of each
    image: np.ndarray  # int64 [samples], the member that is its image
    text: np.ndarray
    json: np.ndarray


def index_shard(path: str, caption_key: str | None) -> Index:
    """The samples of the shard at `path`; with `caption_key`, captions are the values at that key
    of its JSON files.

    An image and its caption have the same name up to the last dot, and may be anywhere in the
    shard. An image or text without such a partner is a further member of the sample named before
    its first dot, as in WebDataset (0001.seg.png of 0001), or left out if there is no such sample.
    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        window = _Window(file)
        members, damage = _read_members(window, texts=caption_key is None)
        samples = _grouped(members)
        faults = _faults(members, samples, window)
        lacking = _lacking(members, samples, window, caption_key)
    lacking |= {sample: f"cannot be used: {fault}" for sample, fault in faults.items()}
    if damage and len(samples.which):
        lacking[int(samples.which[-1])] = (
            ""  # its other members may be cut off, so it is not counted
        )
    whole = np.ones(len(samples.first), bool)
    whole[list(lacking)] = False
    left_out, further = _left_out(members, samples, lacking, whole)
    keys = Packer()
    for row in samples.first[whole].tolist():
        keys.add(_stem(members.names[row]))
    packed = keys.texts()
    in_json = samples.text[whole] < 0
    captions = np.where(in_json, samples.json[whole], samples.text[whole])
    table = np.hstack([members.places[samples.image[whole]], members.places[captions]])
    content = hashlib.sha256("\n".join(packed).encode("utf-8", "surrogatepass"))
    content.update(table[:, 1::2].astype("<i8").tobytes() + in_json.tobytes())
    return Index(
        packed, table, in_json, left_out, further, [*faults.values()], content.hexdigest(), damage
    )


def captions_of(content: bytes, key: str | None) -> tuple[str, ...]:
    """The captions with words of a text file (`key` None), or at `key` of a JSON file.

    Raises ValueError if the text is not UTF-8, or not JSON.
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


def _read_members(window: _Window, *, texts: bool) -> tuple[_Members, str]:
    """(the members with a suffix, where and how the shard is damaged)."""
    names, places, kinds = Packer(), array("q"), array("b")
    hashes, stems, damage = array("q"), array("q"), ""
    try:
        for name, place in _members(window):
            folder = name.rfind(b"/") + 1
            if name.find(b".", folder) <= folder:  # no suffix, or a hidden file
                continue
            stem, _, suffix = name.rpartition(b".")
            names.add(name.decode(errors="replace"))
            places.extend(place)
            kinds.append(_kind(suffix.lower(), place, window, texts=texts))
            hashes.append(hash(name))
            stems.append(hash(stem))
    except Damaged as failure:
        damage = str(failure)
    table = np.array(places, np.int64).reshape(-1, 2)
    columns = np.array(kinds, np.int8), np.array(hashes, np.int64), np.array(stems, np.int64)
    return _Members(names.texts(), table, *columns), damage


def _kind(suffix: bytes, place: Place, window: _Window, *, texts: bool) -> _Kind:
    if place.size < 0:
        return _Kind.OTHER
    if suffix in IMAGES:
        return _Kind.IMAGE
    if suffix == b"json":
        return _Kind.JSON
    if suffix != b"txt" or not texts:
        return _Kind.OTHER
    try:  # now, while the window holds it: no further read
        return _Kind.TEXT if captions_of(window.read(*place), None) else _Kind.BLANK
    except ValueError:
        return _Kind.ENCODED


def _grouped(members: _Members) -> _Samples:
    first, which = numbered(members.stems)

    def first_of(kind: _Kind) -> np.ndarray:
        rows, found = np.flatnonzero(members.kinds == kind)[::-1], np.full(len(first), -1)
        found[which[rows]] = rows  # of several, the last one written wins: the first member
        return found

    return _Samples(first, which, *map(first_of, (_Kind.IMAGE, _Kind.TEXT, _Kind.JSON)))


def _faults(members: _Members, samples: _Samples, window: _Window) -> dict[int, str]:
    """{sample: what is wrong} of samples with a duplicate name, or whose only text is not UTF-8."""
    faults = {}
    names, counts = np.unique(members.hashes, return_counts=True)
    twice = np.isin(members.hashes, names[counts > 1]) & (members.kinds != _Kind.OTHER)
    for row in np.flatnonzero(twice).tolist():
        faults[int(samples.which[row])] = f"{members.names[row]} occurs more than once"
    for row in np.flatnonzero(members.kinds == _Kind.ENCODED).tolist():
        sample = int(samples.which[row])
        if samples.image[sample] >= 0 and samples.text[sample] < 0:
            try:
                window.read(*members.places[row].tolist()).decode()
            except UnicodeDecodeError as failure:
                faults[sample] = f"{members.names[row]} {not_utf8(failure)}"
    return faults


def _lacking(
    members: _Members, samples: _Samples, window: _Window, caption_key: str | None
) -> dict[int, str]:
    """{sample: why} of samples without an image or a caption."""
    kinds = ", ".join(suffix.decode() for suffix in IMAGES)
    no_text = "no .json" if caption_key else "no text in a .txt, and no .json"
    key, lacking = caption_key or "caption", {}
    linked = set(samples.which[members.places[:, 1] < 0].tolist())
    for sample in np.flatnonzero((samples.image < 0) | (samples.text < 0)).tolist():
        if samples.image[sample] < 0:
            lacking[sample] = f"has no image ({kinds})"
        elif samples.json[sample] < 0:
            lacking[sample] = f"has no caption: {no_text}"
        else:
            content = window.read(*members.places[samples.json[sample]].tolist())
            try:
                if not captions_of(content, key):
                    lacking[sample] = f"has no caption: no text under {key!r} in its .json"
            except ValueError as failure:
                lacking[sample] = f"has no caption: its .json cannot be read ({failure})"
    for sample in lacking.keys() & linked:
        lacking[sample] += ", only a link or a sparse file, whose content is not in the shard"
    return lacking


def _left_out(
    members: _Members, samples: _Samples, lacking: dict[int, str], whole: np.ndarray
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """((key, why) of samples that lack something, (member, why) of further members of complete
    samples).
    """
    keys = set(members.stems[samples.first[whole]].tolist()) if lacking else set()
    left_out, owned = [], whole.copy()
    for sample, why in sorted(lacking.items()):
        key = _stem(members.names[int(samples.first[sample])])
        owned[sample] = _owner(key) != key and hash(_owner(key).encode()) in keys
        if why and not owned[sample]:
            left_out.append((key, why))
    free = owned[samples.which] & np.isin(members.kinds, (_Kind.IMAGE, _Kind.TEXT))
    free[samples.image[whole]] = free[samples.text[whole & (samples.text >= 0)]] = False
    further: dict[str, tuple[str, int]] = {}
    for row in np.flatnonzero(free).tolist():
        key, dot, suffix = members.names[row].rpartition(".")
        owner = key if whole[samples.which[row]] else _owner(key)
        suffix = key[len(owner) :] + dot + suffix
        first, count = further.get(suffix, (owner, 0))
        further[suffix] = first, count + 1
    return left_out, [
        (
            first + suffix,
            f"is not a pair but a further member of {first}, like {count:,} *{suffix} here",
        )
        for suffix, (first, count) in further.items()
    ]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _owner(key: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the name."""
    folder = key.rfind("/") + 1
    return key[:folder] + key[folder:].partition(".")[0]


def _members(window: _Window) -> Iterator[tuple[bytes, Place]]:
    """(name, place) of every file, with size -1 for a link or a sparse file; raises Damaged.

    The standard library's reader takes ten times as long, and is used only for rare headers: long
    names, links, sizes of gigabytes.
    """
    at, unusual = 0, None
    while True:
        head = window.read(at, _BLOCK)
        if head[:1] == b"\0" and head.count(0) == _BLOCK:
            rest = window.read(at, 2 * tarfile.RECORDSIZE)  # an archive is padded to a whole record
            if rest.count(0) < len(rest):
                raise Damaged(
                    f"goes on behind the end mark of an archive at byte {at:,}, as where cat has "
                    "joined several (tar -A joins them whole)"
                )
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
    """The size in a plain header; -1 if reading it takes more than its name and size."""
    if head[257:262] != b"ustar" or head[345:346] != b"\0":
        return -1
    try:
        return int(head[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _next(window: _Window, name: bytes, start: int, size: int) -> int:
    """The position of the header after a member; raises Damaged if the file ends before it."""
    if start + size > window.end:
        raise Damaged(f"ends inside {name.decode(errors='replace')}")
    return start + _padded(size)


class _StandardReader:
    """Members as Python's own reader sees them."""

    def __init__(self, window: _Window) -> None:
        self._window = window
        # Opened on an empty archive, since opening a damaged one fails.
        nothing = io.BytesIO(bytes(2 * _BLOCK))
        self._tar = tarfile.TarFile(fileobj=nothing, errors="surrogateescape")
        self._tar.fileobj = window.file

    def member(self, at: int) -> tuple[bytes, Place, int]:
        """(name, place, where the next header is) of the member whose header is at `at`; no name:
        not a file.
        """
        self._window.file.seek(at)
        try:
            found = tarfile.TarInfo.fromtarfile(self._tar)
        except (tarfile.TarError, ValueError) as failure:
            raise Damaged(_reason(self._window, at, failure)) from failure
        if found.size < 0:
            raise Damaged(_reason(self._window, at, ValueError(f"size {found.size}")))
        name = found.name.encode("utf-8", "surrogateescape")
        if found.issparse() or found.islnk() or found.issym():
            return name, Place(found.offset_data, -1), self._tar.offset
        if not found.isreg():
            return b"", Place(0, 0), self._tar.offset
        _next(self._window, name, found.offset_data, found.size)
        return name, Place(found.offset_data, found.size), self._tar.offset


def _reason(window: _Window, at: int, failure: Exception) -> str:
    """Why a shard has no header at `at`.

    Part of the fingerprint: rewording it changes the data of old runs.
    """
    if window.end == 0:
        return "is empty"
    start = window.read(0, 6)
    for magic, tool in COMPRESSED.values():
        if start.startswith(magic):
            return f"is compressed: {unpacking(tool)}"
    if at >= window.end:
        return "ends without the end mark of an archive"
    if at + _BLOCK > window.end or isinstance(failure, _CUT_SHORT):
        return "ends inside a header"
    return f"is no tar file from byte {at:,} on ({failure})"


class _Window:
    """Reads small parts of a file, each near the last."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, os.fstat(file.fileno()).st_size
        self._start, self._held = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """The bytes there; fewer if the file ends first."""
        at = start - self._start
        if at < 0 or at + size > len(self._held):
            self._start, at = start, 0
            self._held = os.pread(self.file.fileno(), max(size, _WINDOW), start)
        return self._held[at : at + size]
