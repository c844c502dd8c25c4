"""Visual grounding, weakly supervised: expressions and their pictures are learned as pairs, and
the attention of the matching score finds the place. No box is seen in training.

Source: Li et al. 2021, 4.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from codebook_jax.data.batch import Batch
from codebook_jax.data.sources import Record, Source
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.text import Tokenizer
from codebook_jax.tasks.pretrain import Pretraining
from codebook_jax.tasks.task import ARCHITECTURE


class Grounding(Pretraining):
    """The jitted programs of a run; holds no parameters."""

    reads, evaluates, adopts = "expressions", ("pairs",), ARCHITECTURE

    def batches(
        self, source: Source, tokenizer: Tokenizer, *, start_step: int, workers: int
    ) -> AbstractContextManager[Iterator[Batch]]:
        """As of pairs of a picture and an expression."""
        pairs = pairs_of(source)
        return super().batches(pairs, tokenizer, start_step=start_step, workers=workers)


def pairs_of(source: Source) -> Source:
    """Expressions as captions of their pictures; a mixture keeps its weights."""
    if isinstance(source, Mixture):
        return Mixture([pairs_of(part) for part in source.sources], source.weights)
    return _Pairs(source)


class _Pairs(Source):
    """Expressions as captions of their pictures."""

    def __init__(self, source: Source) -> None:
        self._source, self.listed, self.left_out = source, source.listed, source.left_out

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        example = self._source[index]
        return Record(example.images[0], (example.text,), example.image_id)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)[:1]

    def name(self, index: int) -> str:
        return self._source.name(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def __repr__(self) -> str:
        return repr(self._source)
