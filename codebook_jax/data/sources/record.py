"""What a source is: records by index, each an image with its captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codebook_jax.data.images import UnreadableImage


class WithoutCaption(UnreadableImage):
    """A record that turns out to have no caption with words when it is read."""


class Record(NamedTuple):
    """An image with all its captions."""

    image: np.ndarray | bytes | str  # uint8 RGB [H, W, 3], or the bytes of a file, or its path
    captions: tuple[str, ...]
    image_id: int  # equal where the image is the same one; from 0, below what the source lists


class Source(Protocol):
    """Records by index. It can be pickled and read from several threads."""

    listed: int  # records before those without an image or a caption were left out
    left_out: Sequence[tuple[str, str]]  # (name or place, why) of those that this source left out itself

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises UnreadableImage where the source itself must read the image and
        cannot, and WithoutCaption where only reading could tell."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of record `index`, without making its image."""

    def name(self, index: int) -> str:
        """What the source calls the image of record `index` (its path, key or id), without reading it."""

    def fingerprint(self) -> str:
        """A hash of the content: equal in every process and under every path."""

    def __repr__(self) -> str:
        """What the source is, without addresses."""


def checked(index: int, length: int) -> int:
    """The index of a record that exists; raises IndexError for another, negative ones too."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return index


def digest(parts: Sequence[str]) -> str:
    """A hash of these texts, for fingerprints."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
