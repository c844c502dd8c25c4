"""Equal and nearly equal hashes among millions, without comparing every pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

_HASH_BITS = 64
_AT_ONCE = 1 << 22  # pairs compared


def first_match(queries: np.ndarray, base: np.ndarray, bits: int) -> np.ndarray:
    """int64 [queries]: the first hash of `base` that differs in at most `bits` bits, uint64 both;
    -1 if none does. A hash of 0 is unknown and matches nothing.

    If the bits are split into bits + 1 bands, such a pair agrees in at least one (the pigeonhole
    principle), so only hashes with an equal band are compared, and each distinct hash once.
    """
    values, which = np.unique(queries, return_inverse=True)
    base_values, first = np.unique(base, return_index=True)
    found = np.full(len(values), len(base))
    edges = np.linspace(0, _HASH_BITS, bits + 2).round().astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        band = np.uint64((1 << high) - (1 << low))
        for ours, theirs in _equal_pairs(values & band, base_values & band):
            one, other = values[ours], base_values[theirs]
            near = (np.bitwise_count(one ^ other) <= bits) & (one != 0) & (other != 0)
            np.minimum.at(found, ours[near], first[theirs[near]])
    return np.where(found < len(base), found, -1)[which]


def earlier_twin(hashes: np.ndarray, bits: int) -> np.ndarray:
    """int64: for each hash the first earlier one that differs in at most `bits` bits; -1: none."""
    first = first_match(hashes, hashes, bits)
    return np.where(first < np.arange(len(hashes)), first, -1)


def _equal_pairs(queries: np.ndarray, base: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers of queries, numbers of base) of all pairs with equal keys, in chunks."""
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
        yield rows, order[low[rows] + within]
        start = stop
