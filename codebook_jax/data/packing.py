"""Shards of packed pairs or examples: their format, and how one is written.

A folder of them, which --mode=prepare writes and `records:FOLDER` reads, holds

- `pairs-00003-of-00042.array_record`: consecutive records of the source, in ArrayRecord with
  `group_size:1,uncompressed`, which checksums each. A record is msgpack of {"image": the bytes of a
  JPEG, "captions": [text], "image_id": number, "name": text}.
- `pairs-00003-of-00042.jsonl`: the same without pictures, a line per record: {"name", "image_id",
  "captions", "height", "width", "bytes", "sha256"}, the last two of the JPEG.
- Of examples, these are named `examples-...` (by older versions, `pairs-...`), a record is msgpack
  of the fields of `Example` and "name", with pictures as JPEGs and boxes in their pixels; a line is
  {"name", "image_id", "captions": the text and the distinct answers, "pictures": their names,
  "height", "width", "bytes", "sha256"}, the last five as lists with an entry for each picture.
- `skipped.tsv`: name and reason of each record left out of the shards.
- `manifest.json`, written last: the contents and hashes of all of them (`data/manifest.py`).

Shard s holds the source's records s * shard_records to (s + 1) * shard_records, without those whose
picture cannot be read. Two runs with the same source and options write the same bytes.
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
from typing import TYPE_CHECKING, NamedTuple

import msgpack
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.manifest import Receipt, Shard, file_sha256, index_name
from codebook_jax.errors import FULL_DISK, UserError
from codebook_jax.files import written_whole

if TYPE_CHECKING:
    from codebook_jax.data.sources.record import Source

WRITER_OPTIONS = "group_size:1,uncompressed"
_LONGEST_JPEG_PX = 65_500  # libjpeg's limit

Told = Callable[[int, int], None]  # (records read, records skipped) since the last call


class Packing(NamedTuple):
    """The options that determine the content of a shard."""

    side_px: int  # upper limit of a picture's shorter side; 0: none
    quality: int  # of JPEGs that are re-encoded
    shard_records: int


def packed_picture(
    image: UInt8[np.ndarray, "height width 3"] | bytes | str, side_px: int, quality: int
) -> tuple[bytes, int, int]:
    """(JPEG, height, width) of a picture, with a shorter side of at most `side_px`.

    A JPEG that is small enough, upright, and grey or RGB keeps its bytes. Anything else is decoded,
    turned upright, put on white, reduced (bicubic, antialiased), and encoded as JPEG of `quality`
    with colour at full resolution (4:4:4), so that drawings and text keep their edges. Raises
    UnreadableImage.
    """
    try:
        content = Path(image).read_bytes() if isinstance(image, str) else image
    except (OSError, ValueError) as failure:
        raise UnreadableImage(getattr(failure, "strerror", None) or str(failure)) from failure
    picture = Picture(content)
    short = min(picture.height, picture.width)
    reduced = bool(side_px) and short > side_px
    if not reduced and picture.shrinks != (1,):  # a JPEG that needs no conversion
        # Raises if truncated; decodes all of it, in two thirds of the time.
        picture.pixels(max(picture.shrinks))
        return content, picture.height, picture.width
    # A JPEG is decoded no larger than needed.
    shrink = max(by for by in picture.shrinks if by == 1 or (reduced and short >= 2 * by * side_px))
    pixels = Image.fromarray(picture.pixels(shrink))
    if reduced:
        size = [max(1, round(side * side_px / short)) for side in (picture.width, picture.height)]
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    width, height = pixels.size
    if max(height, width) > _LONGEST_JPEG_PX:
        raise UnreadableImage(f"{width:,} x {height:,} pixels are more than a JPEG can hold")
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue(), height, width


def write_shard(
    source: Source, shard: int, folder: Path | str, packing: Packing, tell: Told | None = None
) -> Receipt:
    """Writes shard `shard` of the source into the folder; its files appear complete or not at all.

    Pictures that cannot be read are left out and named in the receipt. If the disk is full,
    ArrayRecord raises RuntimeError: see `full_disk_named`.
    """
    from array_record.python import array_record_module

    first, folder = shard * packing.shard_records, Path(folder)
    numbers = range(first, min(len(source), first + packing.shard_records))
    shards = -(-len(source) // packing.shard_records)
    held = "pairs" if source.kind == "pairs" else "examples"
    file = folder / f"{held}-{shard:05d}-of-{shards:05d}.array_record"
    index_file = folder / index_name(file.name)
    # processes on several machines may write into one folder
    draft = folder / f".{file.name}.{uuid.uuid4().hex[:12]}.tmp"
    captions, skipped = 0, []
    pack = _pack_pair if held == "pairs" else _pack_example
    try:
        writer = array_record_module.ArrayRecordWriter(os.fspath(draft), WRITER_OPTIONS)
        lines = written_whole(index_file, errors="surrogatepass")
        with lines as index, contextlib.closing(writer):
            for number in numbers:
                name, before = source.name(number), len(skipped)
                try:
                    packed, entry = pack(source, number, name, packing)
                except UnreadableImage as failure:
                    skipped.append((name, str(failure)))
                else:
                    writer.write(msgpack.packb(packed, unicode_errors="surrogatepass"))
                    index.write(f"{json.dumps(entry, ensure_ascii=False)}\n")
                    captions += len(entry["captions"])
                if tell is not None:
                    tell(1, len(skipped) - before)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    facts = [
        fact for path in (file, index_file) for fact in (path.stat().st_size, file_sha256(path))
    ]
    records = len(numbers) - len(skipped)
    return Shard(file.name, records, captions, len(skipped), *facts), skipped


def _pack_pair(source: Source, number: int, name: str, packing: Packing) -> tuple[dict, dict]:
    """(what a shard holds of a pair, its line in the index)"""
    record = source[number]
    jpeg, height, width = packed_picture(record.image, packing.side_px, packing.quality)
    own, texts = int(record.image_id), list(record.captions)
    packed = {"image": jpeg, "captions": texts, "image_id": own, "name": name}
    entry = {"name": name, "image_id": own, "captions": texts}
    entry |= {"height": height, "width": width, "bytes": len(jpeg)}
    return packed, entry | {"sha256": hashlib.sha256(jpeg).hexdigest()}


def _pack_example(source: Source, number: int, name: str, packing: Packing) -> tuple[dict, dict]:
    """(what a shard holds of an example, its line in the index)"""
    example, options = source[number], (packing.side_px, packing.quality)
    pictures = [packed_picture(image, *options) for image in example.images]
    jpegs, heights, widths = zip(*pictures, strict=True)
    boxes = [*example.proposals, *(() if example.box is None else (example.box,))]
    if boxes:  # in the pixels of the picture as it was
        before = Picture(example.images[0])
        by = np.array([widths[0] / before.width, heights[0] / before.height] * 2)
        boxes = (np.array(boxes) * by).tolist()
        proposals = boxes[: len(example.proposals)]
        example = example._replace(proposals=proposals, box=example.box and boxes[-1])
    own, texts = int(example.image_id), list(source.captions(number))
    packed = {**example._replace(images=jpegs, image_id=own)._asdict(), "name": name}
    entry = {"name": name, "image_id": own, "captions": texts, "pictures": source.pictures(number)}
    entry |= {"height": heights, "width": widths, "bytes": list(map(len, jpegs))}
    return packed, entry | {"sha256": [hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs]}


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raises UserError if the disk is full, which ArrayRecord says only in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as failure:
        if not any(os.strerror(number) in str(failure) for number in FULL_DISK):
            raise
        raise UserError(
            f"no space left while writing shards to {folder}: free some and run the same command "
            "again; it continues with the missing shards"
        ) from failure
