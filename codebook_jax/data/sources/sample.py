"""A sample of the captions of a source: to train a vocabulary on, or to judge a tokenizer by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from codebook_jax.data.sources.record import Source

VOCABULARY_CAPTIONS = 200_000  # at most so many are read to train a vocabulary


def sample_captions(source: Source, most: int = VOCABULARY_CAPTIONS) -> Iterator[str]:
    """At most `most` captions, of records spread evenly over the source."""
    records = min(len(source), max(1, most // max(1, len(source.captions(0)))))
    spread = (record * len(source) // records for record in range(records))
    yield from itertools.islice(itertools.chain.from_iterable(map(source.captions, spread)), most)
