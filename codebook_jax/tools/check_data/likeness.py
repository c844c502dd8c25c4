"""Pictures that are the same, or look the same: among millions, without comparing every pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

_HASH_BITS = 64
_AT_ONCE = 1 << 22  # pairs compared


def first_match(queries: np.ndarray, base: np.ndarray, bits: int) -> np.ndarray:
    """int64 [queries]: the first hash of `base` that differs in at most `bits` bits, uint64 both;
    -1 if none does.
    """
    values, which = np.unique(queries, return_inverse=True)
    base_values, first = np.unique(base, return_index=True)
    pairs = _near(values, base_values, bits)
    found = np.full(len(values), len(base))
    np.minimum.at(found, pairs[:, 0], first[pairs[:, 1]])
    return np.where(found < len(base), found, -1)[which]


def earlier_twin(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64: for each hash the first earlier one that differs in at most `bits` bits; -1 if there
    is none.

    Only the first of equal hashes is compared with others, so that a thousand copies do not make a
    million pairs.
    """
    values, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    pairs = _near(values[order], values[order], bits)
    twin = np.arange(len(values))  # by number of the distinct hash, in order of first appearance
    np.minimum.at(twin, pairs[:, 0], pairs[:, 1])
    number = np.empty(len(values), np.int64)
    number[order] = np.arange(len(values))
    found = first[order][twin[number[which]]]
    return np.where(found < np.arange(len(hashes)), found, -1)


def _near(queries: np.ndarray, base: np.ndarray, bits: int) -> np.ndarray:
    """int64 [pairs, 2]: all (query, base) of distinct hashes that differ in at most `bits` bits,
    some more than once.

    If the bits are split into bits + 1 bands, such a pair agrees in at least one (the pigeonhole
    principle), so only hashes with an equal band are compared.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in _bands(bits):
        for pairs in _sharing(queries & band, base & band):
            differ = np.bitwise_count(queries[pairs[:, 0]] ^ base[pairs[:, 1]])
            found.append(pairs[differ <= bits])
    return np.concatenate(found)


def _bands(bits: int) -> Iterator[np.uint64]:
    """Masks of bits + 1 bands of about equal width."""
    edges = np.linspace(0, _HASH_BITS, bits + 2).round().astype(int)
    for low, high in itertools.pairwise(edges):
        yield np.uint64(((1 << int(high - low)) - 1) << int(low))


def _sharing(queries: np.ndarray, base: np.ndarray) -> Iterator[np.ndarray]:
    """int64 [pairs, 2] of all (query, base) with equal keys, in chunks."""
    order = np.argsort(base, kind="stable")
    ordered = base[order]
    low = np.searchsorted(ordered, queries, side="left")
    counts = np.searchsorted(ordered, queries, side="right") - low
    ends = np.cumsum(counts)
    start = 0
    while start < len(queries):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, side="right")))
        part = counts[start:stop]
        rows = np.repeat(np.arange(start, stop), part)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(part) - part, part)
        yield np.stack([rows, order[low[rows] + within]], axis=1)
        start = stop
