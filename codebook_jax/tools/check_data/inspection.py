"""Inspects every picture of a source: whether it is usable, and two hashes to compare it by."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from codebook_jax.console import Progress
from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import WithoutCaption
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.tools.workers import Tell, spread

_PER_TASK = 128  # pictures
_HASHED_PX = 64  # the perceptual hash reads 32 x 32 pixels of a picture at least twice as large
_FLAT = 2.0  # of 255: pictures that vary less look alike to the hash, whatever they show

Status = enum.IntEnum("Status", "USABLE MISSING EMPTY UNDECODABLE TINY", start=0)  # of a picture


class Finding(NamedTuple):
    """What is found about the picture of a record; a hash of 0 means that it is not compared."""

    status: Status = Status.USABLE
    image_id: int = -1
    content: int = 0  # from the SHA-256 of the file or array, or of the path if not decoded
    look: int = 0  # the perceptual hash
    height: int = 0
    width: int = 0
    reason: str = ""  # why it cannot be used
    first: int = -1  # the first record with this picture


_COLUMNS = np.dtype(
    list(zip(Finding._fields, ("u1", "i8", "u8", "u8", "i4", "i4", "O", "i8"), strict=True))
)


def inspect(source: Source, *, processes: int, decode: bool, least_side_px: int) -> np.ndarray:
    """The Finding of every record, as columns; equal names are the same picture, which is inspected
    once and compared as that of its first record. Without `decode`, only checks that files exist;
    pictures that are not files count as usable. Raises UserError if a process is killed.
    """
    pieces = pieces_of(source)
    names = (
        short_hash(f"{number}:{piece.name(record)}")  # sources may use one name for two pictures
        for number, piece in enumerate(pieces)
        for record in range(len(piece))
    )
    names = np.fromiter(names, np.uint64, len(source))
    _, first, which = np.unique(names, return_index=True, return_inverse=True)
    looked_at = np.repeat([decode or has_files(piece) for piece in pieces], [*map(len, pieces)])
    pictures = np.sort(first[looked_at[first]])
    parts = (pictures[at : at + _PER_TASK] for at in range(0, len(pictures), _PER_TASK))
    work = functools.partial(_inspect_some, decode=decode, least_side_px=least_side_px)
    with Progress("looked at", "pictures", len(source)) as progress:
        progress.advance(len(first) - len(pictures))
        options = {"processes": processes, "field": "check.processes", "tell": progress.advance}
        results = spread(work, source, [part.tolist() for part in parts], **options)
    found = np.zeros(len(source), _COLUMNS)
    found[pictures] = np.concatenate([found[:0], *results])
    found = found[first[which]]
    found["first"] = first[which]
    again = found["first"] < np.arange(len(source))
    found["content"][again] = found["look"][again] = 0
    return found


def pieces_of(source: Source) -> Sequence[Source]:
    """The sources of a mixture, or the one source."""
    return source.sources if isinstance(source, Mixture) else (source,)


def has_files(source: Source) -> bool:
    """Whether its pictures are separate files, so that `source[i].image` is a path."""
    for record in range(min(len(source), _PER_TASK)):
        with contextlib.suppress(UnreadableImage):
            return isinstance(source[record].image, str)
    return False


def _inspect_some(
    source: Source, records: Sequence[int], tell: Tell, *, decode: bool, least_side_px: int
) -> np.ndarray:
    found = [_inspect_one(source, record, decode, least_side_px) for record in records]
    tell(len(found), sum(bool(one.reason) for one in found))
    return np.array(found, _COLUMNS)


def _inspect_one(source: Source, record: int, decode: bool, least_side_px: int) -> Finding:
    status, image_id = Status.UNDECODABLE, -1
    try:
        image, _, image_id = source[record]
        if isinstance(image, str):
            status, why = _file_problem(image)
            if why:
                raise UnreadableImage(f"{image}: {why}")
        if not decode:
            return Finding(image_id=image_id, content=short_hash(os.path.abspath(image)))
        empty = isinstance(image, bytes) and not image
        status = Status.EMPTY if empty else Status.UNDECODABLE
        return _look_at(image, least_side_px)._replace(image_id=image_id)
    except WithoutCaption:  # counted by `read_captions`
        return Finding()
    except UnreadableImage as failure:
        return Finding(status, image_id, reason=str(failure))


def _file_problem(path: str) -> tuple[Status, str]:
    """The status of a file that need not be opened and why, or no reason."""
    try:
        about = os.stat(path)
    except (OSError, ValueError) as failure:
        absent = isinstance(failure, FileNotFoundError | NotADirectoryError | ValueError)
        return Status.MISSING, "the file does not exist" if absent else failure.strerror
    if stat.S_ISDIR(about.st_mode):
        return Status.UNDECODABLE, "it is a folder"
    if not stat.S_ISREG(about.st_mode):  # reading from a pipe may never end
        return Status.UNDECODABLE, "it is not a regular file"
    return Status.EMPTY, "" if about.st_size else "the file is empty"


def _look_at(image: np.ndarray | bytes | str, least_side_px: int) -> Finding:
    """Decodes and hashes a picture; raises UnreadableImage if it is damaged anywhere."""
    name = image if isinstance(image, str) else "the picture"
    picture = Picture(image, name)
    height, width = picture.height, picture.width
    short = min(height, width)
    if not short:
        raise UnreadableImage(f"{name}: it has no pixels ({width} x {height})")
    shrink = max(by for by in picture.shrinks if by == 1 or short >= by * _HASHED_PX)
    grey = Image.fromarray(picture.pixels(shrink)).convert("L")
    look = 0
    if np.asarray(grey).std() >= _FLAT:
        look = int(np.packbits(imagehash.phash(grey).hash.ravel()).view(">u8")[0])
    sha256 = hashlib.sha256(memoryview(picture.content).tobytes()).digest()
    found = Finding(Status.USABLE, -1, int.from_bytes(sha256[:8], "little"), look, height, width)
    if short >= least_side_px:
        return found
    reason = f"{width} x {height} pixels, fewer than config.check.least_side_px={least_side_px}"
    return found._replace(status=Status.TINY, reason=f"{name}: {reason}")
