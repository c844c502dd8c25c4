"""What every picture of a source is like, found in processes: whether it can be used, and three numbers to compare it by."""

from __future__ import annotations

import enum
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from codebook_jax.data.images import Picture, UnreadableImage
from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError

_TASK = 128  # pictures that a process is given at once
_LOOK_PX = 64  # the perceptual hash is of 32 x 32 pixels: decoded no smaller than twice that
_FLAT = 2.0  # of 255: pictures that vary less look alike to the hash whatever they show


class Status(enum.IntEnum):
    """What can be done with a picture."""

    USABLE = 0
    MISSING = 1
    EMPTY = 2
    UNDECODABLE = 3
    TINY = 4


class Images(NamedTuple):
    """The pictures of a source, each once, as inspected; a name that is listed again is the same picture."""

    first: np.ndarray  # int64 [images], the first record of each
    which: np.ndarray  # int32 [records], the picture of each record
    status: np.ndarray  # uint8 [images], of Status
    content: np.ndarray  # uint64 [images], of the SHA-256 of the file, or of the pixels of an array
    look: np.ndarray  # uint64 [images], the perceptual hash
    comparable: np.ndarray  # bool [images], whether that hash means something
    sides: np.ndarray  # int32 [images, 2], height and width
    reasons: dict[int, str]  # picture -> why it cannot be used

    @property
    def usable(self) -> np.ndarray:
        return self.status == Status.USABLE


class _Found(NamedTuple):
    """What is known of one picture."""

    status: Status
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
    """Inspects every picture once; `tell` is called with (how many more are done, how many of them are bad).

    Without `decode`, files are only looked for, and what is no file counts as usable. Raises UserError where a process
    is ended from outside.
    """
    first, which = _distinct(source)
    found = {
        "status": np.zeros(len(first), np.uint8),
        "content": np.zeros(len(first), np.uint64),
        "look": np.zeros(len(first), np.uint64),
        "comparable": np.zeros(len(first), bool),
        "sides": np.zeros((len(first), 2), np.int32),
    }
    reasons: dict[int, str] = {}
    for start, rows in _inspected(source, first, processes, decode, least_side_px):
        for at, row in enumerate(rows, start):
            found["status"][at], found["content"][at], found["look"][at] = row[:3]
            found["comparable"][at], found["sides"][at] = row.comparable, (row.height, row.width)
            if row.status is not Status.USABLE:
                reasons[at] = row.reason
        tell(len(rows), sum(row.status is not Status.USABLE for row in rows))
    return Images(first, which, **found, reasons=reasons)


def _distinct(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(the first record of every name, the name's number of every record), in the order of the source."""
    keys = np.fromiter((short_hash(source.name(at)) for at in range(len(source))), np.uint64, len(source))
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int32)
    places[order] = np.arange(len(first), dtype=np.int32)
    return first[order], places[which]


def short_hash(text: str) -> int:
    """64 bits of a text's hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _inspected(
    source: Source, records: np.ndarray, processes: int, decode: bool, least_side_px: int
) -> Iterator[tuple[int, list[_Found]]]:
    """(number of the first picture, what was found) of one task after another, as they are done."""
    tasks = [(start, records[start : start + _TASK].tolist()) for start in range(0, len(records), _TASK)]
    processes = min(processes or os.cpu_count() or 1, len(tasks))
    if processes == 1:
        for start, part in tasks:
            yield start, [_inspect(source, record, decode, least_side_px) for record in part]
        return
    context = multiprocessing.get_context("spawn")
    given = pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL), decode, least_side_px
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=given) as pool:
        try:
            running = {pool.submit(_work, part): start for start, part in tasks}
            for task in as_completed(running):
                yield running.pop(task), task.result()
        except BrokenProcessPool as failure:
            raise UserError(
                "a process that looks at pictures was ended from outside, as Linux does where memory runs out: start "
                f"the same command again, if need be with fewer, as --config.check.processes={max(1, processes // 2)}"
            ) from failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_own: tuple[Source, bool, int]  # of a worker process


def _start(source: bytes, decode: bool, least_side_px: int) -> None:
    """What a worker process does first: it leaves signals to the first one, and does not outlive it."""
    global _own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()
    _own = pickle.loads(source), decode, least_side_px


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(records: list[int]) -> list[_Found]:
    source, decode, least_side_px = _own
    return [_inspect(source, record, decode, least_side_px) for record in records]


def _inspect(source: Source, record: int, decode: bool, least_side_px: int) -> _Found:
    try:
        image = source[record].image
    except UnreadableImage as failure:
        return _Found(Status.UNDECODABLE, reason=str(failure))
    if isinstance(image, str):
        absent = _absent(image)
        if absent is not None or not decode:
            return absent or _Found(Status.USABLE)
    elif not decode:
        return _Found(Status.USABLE)
    try:
        return _looked_at(image, least_side_px)
    except UnreadableImage as failure:
        empty = isinstance(image, bytes) and not image
        return _Found(Status.EMPTY if empty else Status.UNDECODABLE, reason=str(failure))


def _absent(path: str) -> _Found | None:
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        return _Found(Status.MISSING, reason=f"{path}: there is no such file")
    return None if size else _Found(Status.EMPTY, reason=f"{path}: the file is empty")


def _looked_at(image: np.ndarray | bytes | str, least_side_px: int) -> _Found:
    """Raises UnreadableImage for what cannot be decoded to its end."""
    name = image if isinstance(image, str) else "the picture"
    if isinstance(image, str):
        try:
            with open(image, "rb") as file:
                content = file.read()
        except OSError as failure:
            raise UnreadableImage(f"{name}: {failure.strerror}") from failure
    else:
        content = image
    try:
        picture = Picture(content)
        short = min(picture.height, picture.width)
        pixels = picture.pixels(max(by for by in picture.shrinks if by == 1 or short >= by * _LOOK_PX))
    except UnreadableImage as failure:
        why = str(failure).rpartition(": ")[2] if isinstance(content, bytes) else str(failure)
        raise UnreadableImage(f"{name}: {why}") from failure
    sha256 = hashlib.sha256(content if isinstance(content, bytes) else np.ascontiguousarray(content))
    grey = Image.fromarray(pixels).convert("L")
    look = np.packbits(imagehash.phash(grey).hash.ravel()).view(">u8")[0]
    sizes = picture.height, picture.width
    status, reason = Status.USABLE, ""
    if short < least_side_px:
        status = Status.TINY
        reason = f"{name}: {sizes[1]} x {sizes[0]} pixels, fewer than config.check.least_side_px={least_side_px}"
    comparable = bool(np.asarray(grey).std() >= _FLAT)
    content_hash = int.from_bytes(sha256.digest()[:8], "little")
    return _Found(status, content_hash, int(look), comparable, *sizes, reason)
