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
        records = np.array([int(self._order[position]) for position in positions])
        texts = [self._source.captions(record) for record in records]
        tokens = self._tokenizer.encode(list(itertools.chain(*texts)), most).tokens
        of_record = np.repeat(np.arange(window), [len(own) for own in texts])
        rng = np.random.Generator(np.random.Philox(key=[self._seed, which]))
        return records[groups_of_alike(tokens, of_record, size, rng).ravel()]


def groups_of_alike(
    tokens: Int[np.ndarray, "texts tokens"],
    record: Int[np.ndarray, " texts"],
    size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "groups size"]:
    """The records that the texts belong to, each once, in groups of alike ones, in random order.

    One record after another, drawn at random, takes those most similar to it of the free ones: by
    the cosine of their tokens, which weigh more the fewer records have them (inverse document
    frequency). `size` must divide the number of records.
    """
    words = _weighted(tokens, record)
    count = words.shape[0]
    free, groups = np.ones(count, bool), []
    order = np.arange(count)[::-1]  # of two alike, the first is taken
    for number in rng.permutation(count):
        if free[number]:
            scores = words @ words[[number]].toarray().ravel() * count + order
            scores[number] = np.iinfo(np.int64).max
            scores[~free] = -1
            members = np.sort(np.argpartition(scores, count - size)[count - size :])
            free[members] = False
            groups.append(members)
    return np.stack(groups)[rng.permutation(len(groups))]


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
