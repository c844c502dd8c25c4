"""The interface of a source: records by index, each an image with its captions."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.errors import UserError

NO_CAPTION = "has no caption with words"


class WithoutCaption(UnreadableImage):
    """A record has no caption with words, which showed only when it was read."""


class Record(NamedTuple):
    """An image with all its captions."""

    image: np.ndarray | bytes | str  # uint8 RGB [H, W, 3], or the bytes of a file, or its path
    captions: tuple[str, ...]
    image_id: int  # equal for the same image; from 0, below the source's `listed`


class Source(Protocol):
    """Records by index. It can be pickled and read from several threads."""

    listed: int  # records, including those left out
    left_out: Sequence[tuple[str, str]]  # (name or place, why) of records that this source left out
    form: str  # the scheme
    place: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises UnreadableImage if the source must read the image itself and
        cannot, and WithoutCaption if reading shows that there is no caption.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of record `index`, without making its image."""

    def name(self, index: int) -> str:
        """The name of record `index` in the source (path, key or id), without reading its image."""

    def fingerprint(self) -> str:
        """A hash of the content, equal in every process and wherever the files are."""
        return self._fingerprint

    def __repr__(self) -> str:
        """A description of the source, without memory addresses; packed folders compare it."""
        return f"{self.form}({self.place!r}, images={len(self)})"


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Raises UserError where a record must be readable, as when captions are read at start."""
    try:
        yield
    except UnreadableImage as failure:
        raise UserError(f"{failure}: see that the files are there, then start again") from failure


def checked(index: int, length: int) -> int:
    """The index of a record that exists; raises IndexError if it does not, or is negative."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return index


def part_of(starts: np.ndarray, index: int) -> tuple[int, int]:
    """(which part, index within it) of record `index` of parts that begin at `starts`."""
    which = int(np.searchsorted(starts, checked(index, int(starts[-1])), side="right")) - 1
    return which, int(index - starts[which])


def digest(parts: Sequence[str]) -> str:
    """A hash of these texts, for fingerprints."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


Opened = TypeVar("Opened")


class Recent(Generic[Opened]):
    """The last opened files by name, for several threads; another process opens its own."""

    def __init__(self, opens: Callable[[str], Opened], most: int) -> None:
        self._opens, self._most = opens, most
        self._lock, self._held = threading.Lock(), OrderedDict()

    def __getitem__(self, name: str) -> Opened:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        opened = self._opens(name)  # outside the lock: on a network disk all threads would wait
        with self._lock:
            self._held[name] = opened
            while len(self._held) > self._most:  # closes when the last thread is done with it
                self._held.popitem(last=False)
        return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._opens, self._most)
