"""Inspects every picture of a source in processes: whether it is usable, and three numbers to
compare it by.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import multiprocessing
import os
import pickle
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.record import WithoutCaption
from codebook_jax.data.sources.texts import numbered, short_hash
from codebook_jax.data.stop import serve_parent
from codebook_jax.errors import UserError

_TASK = 128  # pictures per task of a process
_LOOK_PX = (
    64  # the perceptual hash uses 32 x 32 pixels; pictures are decoded at least twice as large
)
_FLAT = 2.0  # of 255: pictures that vary less look alike to the hash, whatever they show


class Status(enum.IntEnum):
    """Whether a picture is usable, or why not."""

    USABLE = 0
    MISSING = 1
    EMPTY = 2
    UNDECODABLE = 3
    TINY = 4


class Images(NamedTuple):
    """The inspected pictures of a source, each once; equal names are the same picture."""

    first: np.ndarray  # int64 [images], the first record of each
    which: np.ndarray  # int32 [records], the picture of each record
    status: np.ndarray  # uint8 [images], of Status
    ids: np.ndarray  # int64 [images], the source's image id; -1 if unknown
    # uint64 [images], from the SHA-256 of the file or array, or of the path if not decoded; 0:
    # unknown
    content: np.ndarray
    look: np.ndarray  # uint64 [images], the perceptual hash
    comparable: np.ndarray  # bool [images], whether that hash is meaningful
    sides: np.ndarray  # int32 [images, 2], height and width
    reasons: dict[int, str]  # picture -> why it cannot be used

    @property
    def usable(self) -> np.ndarray:
        return self.status == Status.USABLE


class _Found(NamedTuple):
    """The result for one picture."""

    status: Status
    image_id: int = -1
    content: int = 0
    look: int = 0
    comparable: bool = False
    height: int = 0
    width: int = 0
    reason: str = ""


def inspect(
    source: Source,
    *,
    processes: int,
    decode: bool,
    least_side_px: int,
    tell: Callable[[int, int], None] = lambda count, bad: None,
) -> Images:
    """Inspects every picture once; calls `tell` with (pictures just done, bad ones among them).

    Without `decode`, only checks that files exist; pictures that are not files count as usable.
    Raises UserError if a process is killed.
    """
    first, which = _distinct(source)
    found = {
        "status": np.zeros(len(first), np.uint8),
        "ids": np.full(len(first), -1),
        "content": np.zeros(len(first), np.uint64),
        "look": np.zeros(len(first), np.uint64),
        "comparable": np.zeros(len(first), bool),
        "sides": np.zeros((len(first), 2), np.int32),
    }
    reasons: dict[int, str] = {}
    if not decode and not is_of_files(source):
        tell(len(first), 0)
        return Images(first, which, **found, reasons=reasons)
    inspected = contextlib.closing(_inspected(source, first, processes, decode, least_side_px))
    with inspected as tasks:
        for start, rows in tasks:
            for at, row in enumerate(rows, start):
                for name, value in zip(("status", "ids", "content", "look"), row[:4], strict=True):
                    found[name][at] = value
                found["comparable"][at], found["sides"][at] = (
                    row.comparable,
                    (row.height, row.width),
                )
                if row.status is not Status.USABLE:
                    reasons[at] = row.reason
            tell(len(rows), sum(row.status is not Status.USABLE for row in rows))
    return Images(first, which, **found, reasons=reasons)


def is_of_files(source: Source) -> bool:
    """Whether its pictures are separate files, so that `source[i].image` is a path, not read by the
    source.
    """
    for record in range(min(len(source), _TASK)):
        try:
            return isinstance(source[record].image, str)
        except UnreadableImage:
            continue
    return False


def joined(parts: Sequence[Images], starts: Sequence[int]) -> Images:
    """The pictures of several sources, whose records begin at `starts`, combined."""
    names = ("status", "content", "look", "comparable", "sides")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    firsts, whiches, ids, reasons, before = [], [], [], {}, 0
    for part, start in zip(parts, starts, strict=True):
        firsts.append(part.first + start)
        whiches.append(part.which + np.int32(before))
        ids.append(np.where(part.ids < 0, -1, part.ids + start))
        reasons |= {before + at: reason for at, reason in part.reasons.items()}
        before += len(part.first)
    return Images(
        np.concatenate(firsts),
        np.concatenate(whiches),
        ids=np.concatenate(ids),
        reasons=reasons,
        **columns,
    )


def _distinct(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(the first record of every name, the name's number of every record), in the order of the
    source.
    """
    keys = np.fromiter(
        (short_hash(source.name(at)) for at in range(len(source))), np.uint64, len(source)
    )
    return numbered(keys)


def _inspected(
    source: Source, records: np.ndarray, processes: int, decode: bool, least_side_px: int
) -> Iterator[tuple[int, list[_Found]]]:
    """(number of the first picture, results) of each task, as they finish."""
    tasks = [
        (start, records[start : start + _TASK].tolist()) for start in range(0, len(records), _TASK)
    ]
    processes = min(processes or os.cpu_count() or 1, len(tasks))
    if processes == 1:
        for start, part in tasks:
            yield start, [_inspect(source, record, decode, least_side_px) for record in part]
        return
    context = multiprocessing.get_context("spawn")
    given = pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL), decode, least_side_px
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=given) as pool:
        try:
            running = {pool.submit(_work, part): start for start, part in tasks}
            for task in as_completed(running):
                yield running.pop(task), task.result()
        except BrokenProcessPool as failure:
            raise UserError(
                "a process that inspects pictures was killed, as Linux does when memory runs out: "
                "run the same command again, if necessary with fewer processes: "
                f"--config.check.processes={max(1, processes // 2)}"
            ) from failure
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()  # otherwise the pool would wait for their tasks
            raise


_own: tuple[Source, bool, int]  # of a worker process


def _start(source: bytes, decode: bool, least_side_px: int) -> None:
    """Called first in a worker process: leaves signals to the parent, and exits with it."""
    global _own
    serve_parent()
    keep_quiet()
    _own = pickle.loads(source), decode, least_side_px


def keep_quiet() -> None:
    """Silences Pillow: what it warns of is found here or harmless, such as broken EXIF blocks."""
    warnings.filterwarnings("ignore", module="PIL")


def _work(records: list[int]) -> list[_Found]:
    source, decode, least_side_px = _own
    return [_inspect(source, record, decode, least_side_px) for record in records]


def _inspect(source: Source, record: int, decode: bool, least_side_px: int) -> _Found:
    try:
        image, _, image_id = source[record]
    except WithoutCaption:  # counted by `read_captions`
        return _Found(Status.USABLE)
    except UnreadableImage as failure:
        return _Found(Status.UNDECODABLE, reason=str(failure))
    found = _unreadable(image) if isinstance(image, str) else None
    if found is None and not decode:
        content = short_hash(os.path.abspath(image)) if isinstance(image, str) else 0
        found = _Found(Status.USABLE, content=content)
    if found is None:
        try:
            found = _looked_at(image, least_side_px)
        except UnreadableImage as failure:
            empty = isinstance(image, bytes) and not image
            found = _Found(Status.EMPTY if empty else Status.UNDECODABLE, reason=str(failure))
    return found._replace(image_id=image_id)


def _unreadable(path: str) -> _Found | None:
    """The result if the file need not be opened: it is missing, not a regular file, or empty; else
    None.
    """
    try:
        about = os.stat(path)
    except (OSError, ValueError) as failure:
        absent = isinstance(failure, FileNotFoundError | NotADirectoryError | ValueError)
        why = "the file does not exist" if absent else failure.strerror
        return _Found(Status.MISSING, reason=f"{path}: {why}")
    if stat.S_ISDIR(about.st_mode):
        return _Found(Status.UNDECODABLE, reason=f"{path}: it is a folder")
    if not stat.S_ISREG(about.st_mode):  # reading from a pipe may never end
        return _Found(Status.UNDECODABLE, reason=f"{path}: it is not a regular file")
    return None if about.st_size else _Found(Status.EMPTY, reason=f"{path}: the file is empty")


def _looked_at(image: np.ndarray | bytes | str, least_side_px: int) -> _Found:
    """Raises UnreadableImage if the picture cannot be decoded completely."""
    name = image if isinstance(image, str) else "the picture"
    picture = Picture(image, name)
    short = min(picture.height, picture.width)
    if not short:
        raise UnreadableImage(f"{name}: it has no pixels ({picture.width} x {picture.height})")
    pixels = picture.pixels(max(by for by in picture.shrinks if by == 1 or short >= by * _LOOK_PX))
    content = picture.content
    sha256 = hashlib.sha256(
        content if isinstance(content, bytes) else np.ascontiguousarray(content)
    )
    grey = Image.fromarray(pixels).convert("L")
    look = np.packbits(imagehash.phash(grey).hash.ravel()).view(">u8")[0]
    sizes = picture.height, picture.width
    status, reason = Status.USABLE, ""
    if short < least_side_px:
        status = Status.TINY
        reason = f"{name}: {sizes[1]} x {sizes[0]} pixels, fewer than config.check.least_side_px={least_side_px}"
    comparable = bool(np.asarray(grey).std() >= _FLAT)
    content_hash = int.from_bytes(sha256.digest()[:8], "little")
    return _Found(
        status,
        content=content_hash,
        look=int(look),
        comparable=comparable,
        height=sizes[0],
        width=sizes[1],
        reason=reason,
    )
