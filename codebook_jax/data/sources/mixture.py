"""Several sources as one: their records in sequence, and the order in which training reads them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from codebook_jax.data.sources.record import Example, Record, Source, digest, part_of

if TYPE_CHECKING:
    import grain


class Mixture(Source):
    """The records of several sources, numbered through; no image of one is that of another."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        """`weights` (None: their sizes) are the sources' shares of the training stream."""
        self.sources, self.kind = tuple(sources), sources[0].kind
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        self.starts = np.cumsum([0, *map(len, self.sources)])
        self.listed = sum(source.listed for source in self.sources)
        self.left_out = tuple(item for source in self.sources for item in source.left_out)
        # Ids are below `listed`, not the length: packed records keep the numbers of their list.
        self._first_ids = np.cumsum([0, *(source.listed for source in self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record | Example:
        which, own = part_of(self.starts, index)
        record = self.sources[which][own]
        return record._replace(image_id=record.image_id + int(self._first_ids[which]))

    def captions(self, index: int) -> tuple[str, ...]:
        which, own = part_of(self.starts, index)
        return self.sources[which].captions(own)

    def name(self, index: int) -> str:
        which, own = part_of(self.starts, index)
        return self.sources[which].name(own)

    def pictures(self, index: int) -> tuple[str, ...]:
        which, own = part_of(self.starts, index)
        return self.sources[which].pictures(own)

    def fingerprint(self) -> str:
        parts = (source.fingerprint() for source in self.sources)
        return digest([*parts, f"weights {self.weights}"])

    def __repr__(self) -> str:
        return f"mixture({', '.join(map(repr, self.sources))}; weights={self.weights})"


def training_order(source: Source, seed: int) -> grain.MapDataset:
    """Position in the run -> record of the source: random access, computed and not stored.

    Every record appears once per epoch, in a new order each epoch. With weights, each source cycles
    through its own records so, and gets its share of every part of the stream.
    """
    import grain  # imported here: it imports JAX, which prepare and check-data do not need

    weights = source.weights if isinstance(source, Mixture) else None
    starts = [0, len(source)] if weights is None else source.starts.tolist()
    orders = [
        grain.MapDataset.range(*bounds).seed((seed + 7919 * number) % 2**32).shuffle().repeat()
        for number, bounds in enumerate(itertools.pairwise(starts))
    ]
    return orders[0] if weights is None else grain.MapDataset.mix(orders, weights)
