"""An order of training in which alike captions meet in a batch, so that its negatives are hard.

Source: GRIT-VLP (Byun et al. 2022, 3.1), which compares the model's features; here captions alone
are compared, so that the order stays a function of seed and position.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import sparse

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError

_DIGITS = 1000  # that similarities are rounded to, so that every machine ranks them alike
_KEPT = 3  # windows: batches are read ahead, and by several threads


class Alike(NamedTuple):
    """Which records meet: groups of `size` out of a window of so many of the order's."""

    size: int
    window: int  # at most an epoch
    max_tokens: int  # of each caption, that are compared


class AlikeOrder:
    """A training order whose windows, but for the first, come in groups of alike captions.

    Position -> record of the source. A window has the records that it has in the order given.
    """

    def __init__(
        self, order: Sequence[int], source: Source, tokenizer: Tokenizer, seed: int, alike: Alike
    ) -> None:
        self._order, self._source, self._tokenizer = order, source, tokenizer
        self._seed, self._size, self._max_tokens = seed % 2**64, alike.size, alike.max_tokens
        self._window = max(1, min(alike.window, len(source)) // alike.size) * alike.size
        self._lock, self._windows = threading.Lock(), {}

    def __getitem__(self, position: int) -> int:
        which, place = divmod(position, self._window)
        if which == 0:  # a model that knows nothing yet gains nothing from hard negatives
            return int(self._order[position])
        with self._lock:
            is_new = which not in self._windows
            if is_new:
                recent = sorted(self._windows)[1 - _KEPT :]
                self._windows = {number: self._windows[number] for number in recent}
                self._windows[which] = futures.Future()
            arranged = self._windows[which]
        if is_new:
            try:
                arranged.set_result(self._arranged(which))
            except BaseException as error:
                arranged.set_exception(error)
        return int(arranged.result()[place])

    def _arranged(self, which: int) -> Int[np.ndarray, " window"]:
        positions = range(which * self._window, (which + 1) * self._window)
        records, counts = np.unique([int(self._order[at]) for at in positions], return_counts=True)
        texts = [self._captions(record) for record in records.tolist()]
        record = np.repeat(np.arange(len(records)), [len(own) for own in texts])
        tokens, lengths, _ = self._tokenizer.encode(list(itertools.chain(*texts)), self._max_tokens)
        # neither padding nor a word that the vocabulary lacks makes captions alike
        counted = np.arange(self._max_tokens) < lengths[:, None]
        text, place = np.nonzero(counted & (tokens != self._tokenizer.unknown_id))
        words = weighted(record[text], tokens[text, place], len(records))
        rng = np.random.Generator(np.random.Philox(key=[self._seed, which]))
        return records[groups_of_alike(words, counts, self._size, rng).ravel()]

    def _captions(self, record: int) -> Sequence[str]:
        try:
            return self._source.captions(record)
        except (UnreadableImage, UserError):  # who reads the record itself replaces and counts it
            return ()


def weighted(
    record: Int[np.ndarray, " pairs"], token: Int[np.ndarray, " pairs"], records: int
) -> sparse.csr_array:
    """A row for each record: the weights of the tokens that it has, with a length of `_DIGITS`.

    A token weighs more the fewer records have it (inverse document frequency).
    """
    pairs = np.unique(np.stack([record, token], axis=1), axis=0)
    rows, columns = pairs.T
    weight = np.log(records / np.maximum(np.bincount(columns), 1))[columns]
    length = np.sqrt(np.bincount(rows, weight**2, minlength=records))
    scaled = np.rint(_DIGITS * weight / np.maximum(length, 1e-6)[rows]).astype(np.int64)
    shape = records, columns.max(initial=0) + 1
    return sparse.csr_array((scaled, (rows, columns)), shape=shape)


def groups_of_alike(
    words: sparse.csr_array,
    counts: Int[np.ndarray, " records"],
    size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "groups size"]:
    """Groups of records with alike `words`, in random order. Each record is there as often as
    `counts` says, in different groups while other records are left.

    One record after another, drawn at random, takes those with the largest cosine. `size` must
    divide the sum of the counts.
    """
    left, groups = counts.copy(), []
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
