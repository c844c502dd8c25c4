"""Pairs packed into shards: what a shard is, and how one is written.

A folder of packed pairs, as --mode=prepare leaves it and `records:FOLDER` reads it, holds

- `pairs-00003-of-00042.array_record`: the records of one stretch of the source in its order, in ArrayRecord with
  `group_size:1,uncompressed` (each is read alone, and JPEG does not get smaller). ArrayRecord keeps a hash of each.
  A record is msgpack of {"image": the bytes of a JPEG, "captions": [text], "image_id": number, "name": text}.
- `pairs-00003-of-00042.jsonl`: the same without pictures, a line a record: {"name", "image_id", "captions", "height",
  "width", "bytes", "sha256"}, the last two of the JPEG.
- `skipped.tsv`: name and reason of each record that is in no shard.
- `manifest.json`, written last: what all of them hold, and their hashes (`codebook_jax.data.manifest`).

Shard s holds those of the source's records s * shard_records to (s + 1) * shard_records whose picture can be read. What
is written follows from the source and the options alone: two runs leave the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np
from PIL import Image

from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.errors import FULL_DISK, UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.record import Record, Source

WRITER_OPTIONS = "group_size:1,uncompressed"
_LONGEST_JPEG_PX = 65_500  # libjpeg's
_TOLD_EVERY = 64  # records

Told = Callable[[int, int], None]  # records read, and skipped, since it was last told


class Packing(NamedTuple):
    """What decides the content of a shard, besides the source."""

    side_px: int  # longest that the shorter side of a picture may be; 0: as it is
    quality: int  # of JPEGs that are written anew
    shard_records: int


class Packed(NamedTuple):
    """A picture as it is packed."""

    jpeg: bytes
    height: int
    width: int


class Receipt(NamedTuple):
    """What is known of a shard that is written."""

    records: int
    captions: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    skipped: tuple[tuple[str, str], ...]  # (name, why)


def shard_count(records: int, shard_records: int) -> int:
    """How many shards the records of a source make."""
    return -(-records // shard_records)


def shard_name(shard: int, shards: int) -> str:
    """The name of a shard's file."""
    return f"pairs-{shard:05d}-of-{shards:05d}.array_record"


def index_name(file: str) -> str:
    """The name of the index beside a shard's file."""
    return f"{file.removesuffix('.array_record')}.jsonl"


def packed_picture(image: np.ndarray | bytes | str, side_px: int, quality: int) -> Packed:
    """The picture as a JPEG whose shorter side is at most `side_px`.

    The bytes of a JPEG that is small enough, upright, and grey or RGB stay as they are. Anything else is decoded,
    turned upright, laid on white, made smaller (bicubic, antialiased), and written as JPEG of `quality` with colour in
    full resolution (4:4:4): drawings and text keep their edges. Raises UnreadableImage for what cannot be decoded.
    """
    content = _read(image) if isinstance(image, str) else image
    picture = Picture(content)
    short = min(picture.height, picture.width)
    is_jpeg = picture.shrinks != (1,)  # of the kinds that decode as they are
    if is_jpeg and (not side_px or short <= side_px):
        picture.pixels(
            max(picture.shrinks)
        )  # raises for one cut short; reads all of it, in two thirds of the time
        return Packed(content, picture.height, picture.width)
    pixels = _smaller(picture, short, side_px)
    height, width = pixels.shape[:2]
    if max(height, width) > _LONGEST_JPEG_PX:
        raise UnreadableImage(f"{width:,} x {height:,} pixels are more than a JPEG can have")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return Packed(file.getvalue(), height, width)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as failure:
        raise UnreadableImage(getattr(failure, "strerror", None) or str(failure)) from failure


def _smaller(picture: Picture, short: int, side_px: int) -> np.ndarray:
    """The pixels with a shorter side of `side_px` if it was longer; a JPEG is decoded no larger than that needs."""
    if not side_px or short <= side_px:
        return picture.pixels()
    shrink = max(by for by in picture.shrinks if by == 1 or short >= 2 * by * side_px)
    size = (max(1, round(side * side_px / short)) for side in (picture.width, picture.height))
    pixels = Image.fromarray(picture.pixels(shrink))
    return np.asarray(pixels.resize(tuple(size), Image.Resampling.BICUBIC))


def pack(record: Record, name: str, jpeg: bytes) -> bytes:
    """A record as a shard holds it."""
    content = {
        "image": jpeg,
        "captions": list(record.captions),
        "image_id": int(record.image_id),
        "name": name,
    }
    return msgpack.packb(content, unicode_errors="surrogatepass")


def unpack(content: bytes) -> dict[str, Any]:
    """{"image", "captions", "image_id", "name"} of a record in a shard; raises ValueError for what is none."""
    return msgpack.unpackb(content, unicode_errors="surrogatepass")


def write_shard(
    source: Source, shard: int, folder: Path | str, packing: Packing, tell: Told | None = None
) -> Receipt:
    """Writes shard `shard` of the source into the folder; its files appear whole or not at all.

    Pictures that cannot be read are left out, and named in the receipt. Where the disk is full ArrayRecord raises
    RuntimeError: see `full_disk_named`.
    """
    folder = Path(folder)
    name = shard_name(shard, shard_count(len(source), packing.shard_records))
    with _drafts(folder, name, index_name(name)) as drafts:
        counts, skipped = _fill(source, shard, drafts, packing, tell)
        sizes = [(draft.stat().st_size, file_sha256(draft)) for draft in drafts]
    (size, sha256), (index_size, index_sha256) = sizes
    return Receipt(*counts, size, sha256, index_size, index_sha256, tuple(skipped))


def _fill(
    source: Source, shard: int, drafts: list[Path], packing: Packing, tell: Told | None
) -> tuple[tuple[int, int], list[tuple[str, str]]]:
    """((records, captions), skipped) of a shard, written into its two drafts."""
    from array_record.python import array_record_module

    first = shard * packing.shard_records
    records = captions = 0
    skipped: list[tuple[str, str]] = []
    told = 0, 0  # read, skipped
    stop = min(len(source), first + packing.shard_records)
    writer = array_record_module.ArrayRecordWriter(os.fspath(drafts[0]), WRITER_OPTIONS)
    with open(drafts[1], "wb") as index, contextlib.closing(writer):
        for number in range(first, stop):
            name = source.name(number)
            try:
                record = source[number]
                packed = packed_picture(record.image, packing.side_px, packing.quality)
            except UnreadableImage as failure:
                skipped.append((name, str(failure)))
            else:
                writer.write(pack(record, name, packed.jpeg))
                index.write(_index_line(record, name, packed))
                records, captions = records + 1, captions + len(record.captions)
            read = number + 1 - first
            if tell is not None and (read % _TOLD_EVERY == 0 or number + 1 == stop):
                tell(read - told[0], len(skipped) - told[1])
                told = read, len(skipped)
    return (records, captions), skipped


def _index_line(record: Record, name: str, packed: Packed) -> bytes:
    entry = {
        "name": name,
        "image_id": int(record.image_id),
        "captions": list(record.captions),
        "height": packed.height,
        "width": packed.width,
        "bytes": len(packed.jpeg),
        "sha256": hashlib.sha256(packed.jpeg).hexdigest(),
    }
    return f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "surrogatepass")


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _drafts(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Hidden files to write, which get these names, on the disk, where nothing was raised; else they are removed."""
    own = uuid.uuid4().hex[
        :12
    ]  # of this attempt: processes of several machines may write one folder
    drafts = [folder / f".{name}.{own}.tmp" for name in names]
    try:
        yield drafts
        for draft in drafts:
            _flush(draft)
        for draft, name in zip(drafts, names, strict=True):
            draft.replace(folder / name)
        _flush(folder)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raises UserError where the disk is full, which ArrayRecord says in the text of a RuntimeError alone."""
    try:
        yield
    except (OSError, RuntimeError) as failure:
        full = getattr(failure, "errno", None) in FULL_DISK
        if not full and not any(os.strerror(number) in str(failure) for number in FULL_DISK):
            raise
        raise UserError(
            f"no space left while writing shards to {folder}: free some and start the same command again, it goes on "
            "with the shards that lack"
        ) from failure
