"""The interface of a source: records by index, each an image with its captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codebook_jax.data.images import UnreadableImage


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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises UnreadableImage if the source must read the image itself and
        cannot, and WithoutCaption if reading shows that there is no caption.
        """

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of record `index`, without making its image."""

    def name(self, index: int) -> str:
        """The name of record `index`'s image in the source (its path, key or id), without reading
        it.
        """

    def fingerprint(self) -> str:
        """A hash of the content, equal in every process and wherever the files are."""

    def __repr__(self) -> str:
        """A description of the source, without memory addresses."""


def checked(index: int, length: int) -> int:
    """The index of a record that exists; raises IndexError if it does not, or is negative."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return index


def digest(parts: Sequence[str]) -> str:
    """A hash of these texts, for fingerprints."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
