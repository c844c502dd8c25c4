"""Millions of short texts and keys, without a Python object each: as large as their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np


class Texts:
    """A growing sequence of texts, stored as one run of UTF-8 bytes and the start of each."""

    def __init__(self) -> None:
        self._packed, self._starts = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = self._starts[index : index + 2]
        return self._packed[start:stop].decode("utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        self._packed += text.encode("utf-8", "surrogatepass")
        self._starts.append(len(self._packed))


class TextLists:
    """A growing sequence of lists of texts, stored in the same way."""

    def __init__(self) -> None:
        self._texts, self._starts = Texts(), array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        start, stop = self._starts[index : index + 2]
        return tuple(self._texts[place] for place in range(start, stop))

    def append(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._texts.append(text)
        self._starts.append(len(self._texts))


def numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [kinds]: where each key first appears, int32 [keys]: its number in that order)"""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int32)
    places[order] = np.arange(len(first), dtype=np.int32)
    return first[order], places[which]


def grouped(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [keys]: the places of each number, adjacent; int64 [kinds + 1]: where each begins)."""
    return np.argsort(numbers, kind="stable"), np.cumsum([0, *np.bincount(numbers)])


def short_hash(text: str) -> int:
    """A 64-bit hash of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def not_utf8(failure: UnicodeDecodeError) -> str:
    """What is wrong with a text, as a predicate: "is not UTF-8 text ..."."""
    wrong = failure.object[failure.start : failure.end]
    before = failure.object[max(0, failure.start - 20) : failure.start].decode(errors="replace")
    return f"is not UTF-8 text (byte {wrong.hex()} after {before!r})"
