"""Examples seen as pairs, a record for each picture, so that all of them are checked alike."""

from __future__ import annotations

from codebook_jax.data.sources import Record, Source
from codebook_jax.data.sources.mixture import Mixture


def as_pairs(source: Source) -> Source:
    """The source, or if it has examples, their pictures as pairs."""
    if source.kind == "pairs":
        return source
    if isinstance(source, Mixture):
        return Mixture([_Pictures(piece) for piece in source.sources], source.weights)
    return _Pictures(source)


class _Pictures(Source):
    """The pictures of examples, those of one example in a row, the first with its texts.

    What it lists and leaves out is counted in examples.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.kind = source, source.kind
        self.form, self.place = source.form, source.place
        self.listed, self.left_out = source.listed, source.left_out

    def __len__(self) -> int:
        return self.pictures_each * len(self._source)

    def __getitem__(self, index: int) -> Record:
        which, place = divmod(index, self.pictures_each)
        return Record(self._source[which].images[place], self.captions(index), index)

    def captions(self, index: int) -> tuple[str, ...]:
        which, place = divmod(index, self.pictures_each)
        return () if place else self._source.captions(which)

    def name(self, index: int) -> str:
        which, place = divmod(index, self.pictures_each)
        return self._source.pictures(which)[place]

    def __repr__(self) -> str:
        return repr(self._source)
