"""An order of training in which alike captions meet in a batch, so that its negatives are hard.

Source: GRIT-VLP (Byun et al. 2022, 3.1), which compares the model's features; here captions alone
are compared, so that the order stays a function of seed and position.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import sparse

from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer

_DIGITS = 1000  # that similarities are rounded to, so that every machine ranks them alike
_KEPT = 3  # windows: batches are read ahead, and by several threads


class Alike(NamedTuple):
    """Which records meet: groups of `size` out of a window of so many of the order's."""

    size: int
    window: int
    max_tokens: int  # of each caption, that are compared


class AlikeOrder:
    """A training order whose windows, but for the first, come in groups of alike captions.

    Position -> record of the source. A window has the records that it has in the order given.
    """

    def __init__(
        self, order: Sequence[int], source: Source, tokenizer: Tokenizer, seed: int, alike: Alike
    ) -> None:
        self._order, self._source, self._tokenizer = order, source, tokenizer
        self._seed, self._alike = seed % 2**64, alike
        self._lock, self._windows = threading.Lock(), {}

    def __getitem__(self, position: int) -> int:
        which, place = divmod(position, self._alike.window)
        if which == 0:  # a model that knows nothing yet gains nothing from hard negatives
            return int(self._order[position])
        with self._lock:
            if which not in self._windows:
                recent = sorted(self._windows)[1 - _KEPT :]
                self._windows = {number: self._windows[number] for number in recent}
                self._windows[which] = self._arranged(which)
            return int(self._windows[which][place])

    def _arranged(self, which: int) -> Int[np.ndarray, " window"]:
        size, window, most = self._alike
        positions = range(which * window, (which + 1) * window)
        records, counts = np.unique([int(self._order[at]) for at in positions], return_counts=True)
        texts = [self._source.captions(record) for record in records.tolist()]
        tokens = self._tokenizer.encode(list(itertools.chain(*texts)), most).tokens
        of_record = np.repeat(np.arange(len(records)), [len(own) for own in texts])
        rng = np.random.Generator(np.random.Philox(key=[self._seed, which]))
        return records[groups_of_alike(tokens, of_record, counts, size, rng).ravel()]


def groups_of_alike(
    tokens: Int[np.ndarray, "texts tokens"],
    record: Int[np.ndarray, " texts"],
    counts: Int[np.ndarray, " records"],
    size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "groups size"]:
    """Groups of alike records in random order; `record` is that of each text, and each record is
    there as often as `counts` says, in different groups while other records are left.

    One record after another, drawn at random, takes those most similar to it: by the cosine of
    their tokens, which weigh more the fewer records have them (inverse document frequency). `size`
    must divide the sum of the counts.
    """
    words, left, groups = _weighted(tokens, record), counts.copy(), []
    order = np.arange(len(left))[::-1]  # of two alike, the first is taken
    for number in rng.permutation(np.repeat(np.arange(len(left)), counts)):
        if left[number]:
            scores = words @ words[[number]].toarray().ravel() * len(left) + order
            scores[number] = np.iinfo(np.int64).max
            members: list[int] = []
            while len(members) < size:
                most = min(size - len(members), np.count_nonzero(left))
                free = np.where(left > 0, scores, -1)
                taken = np.sort(np.argpartition(free, len(free) - most)[len(free) - most :])
                left[taken] -= 1
                members.extend(taken.tolist())
            groups.append(members)
    return np.array(groups)[rng.permutation(len(groups))]


def _weighted(
    tokens: Int[np.ndarray, "texts tokens"], record: Int[np.ndarray, " texts"]
) -> sparse.csr_array:
    """A row for each record: the weights of its tokens, with a length of `_DIGITS`."""
    pairs = np.stack([np.broadcast_to(record[:, None], tokens.shape), tokens], axis=-1)
    rows, columns = np.unique(pairs.reshape(-1, 2), axis=0).T
    count = rows[-1] + 1
    weight = np.log(count / np.bincount(columns)[columns])  # [CLS] and the like: 0
    length = np.sqrt(np.bincount(rows, weight**2))
    scaled = np.rint(_DIGITS * weight / np.maximum(length, 1e-6)[rows])
    return sparse.csr_array((scaled.astype(np.int64), (rows, columns)))
