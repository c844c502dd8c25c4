"""Statistics of the captions of a source: length in tokens, and which are shared by several
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.data.text import LONGEST, Tokenizer, Unknown, clean

_AT_ONCE = 4096  # captions


class Said(NamedTuple):
    """What is kept of each caption of a source, as the model reads it."""

    lengths: (
        np.ndarray
    )  # int64 [LONGEST + 1], number of captions of each length in tokens, [CLS] and [SEP] included
    keys: np.ndarray  # uint64 [captions], of the text
    records: np.ndarray  # int64 [captions]
    silent: np.ndarray  # bool [records]: no caption gives a token; such captions are not counted
    unknown: Unknown  # tokens


class Repeated(NamedTuple):
    """A caption shared by several pictures, as the model reads it."""

    caption: str
    images: int


class Captions(NamedTuple):
    """The captions of a source."""

    lengths: np.ndarray  # int64 [LONGEST + 1], as of Said
    repeated: int  # captions that more than one picture has
    most_repeated: list[Repeated]
    unknown: Unknown

    @property
    def count(self) -> int:
        return int(self.lengths.sum())

    def truncated(self, max_tokens: int) -> int:
        """The number of captions longer than the model reads."""
        return int(self.lengths[max_tokens + 1 :].sum())


def read_captions(
    source: Source, tokenizer: Tokenizer, tell: Callable[[int], None] = lambda records: None
) -> Said:
    """Reads every caption; calls `tell` with the number of records just done."""
    lengths = np.zeros(LONGEST + 1, np.int64)
    keys: list[np.ndarray] = [np.empty(0, np.uint64)]
    records: list[np.ndarray] = [np.empty(0, np.int64)]
    silent, unknown = np.ones(len(source), bool), np.zeros(2, np.int64)
    texts, owners = [], []
    told = 0
    for record in range(len(source)):
        for caption in source.captions(record):
            texts.append(caption)
            owners.append(record)
        if len(texts) >= _AT_ONCE or record + 1 == len(source):
            texts, owners = _readable(tokenizer, texts, owners)
            tokens, counts, _ = tokenizer.encode(texts, LONGEST)
            lengths += np.bincount(counts, minlength=LONGEST + 1)
            unknown += tokenizer.unknown(tokens, counts)
            keys.append(np.array([short_hash(clean(text)) for text in texts], np.uint64))
            records.append(np.array(owners, np.int64))
            silent[owners] = False
            tell(record + 1 - told)
            texts, owners, told = [], [], record + 1
    return Said(
        lengths, np.concatenate(keys), np.concatenate(records), silent, Unknown(*unknown.tolist())
    )


def _readable(
    tokenizer: Tokenizer, texts: list[str], owners: list[int]
) -> tuple[list[str], list[int]]:
    read = set(tokenizer.readable(texts))
    kept = [(text, owner) for text, owner in zip(texts, owners, strict=True) if text in read]
    return [text for text, _ in kept], [owner for _, owner in kept]


def joined_captions(parts: Sequence[Said], starts: Sequence[int]) -> Said:
    """The captions of several sources, whose records begin at `starts`, combined."""
    return Said(
        np.sum([part.lengths for part in parts], axis=0),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.records + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.silent for part in parts]),
        Unknown(*np.sum([part.unknown for part in parts], axis=0).tolist()),
    )


def compared_captions(said: Said, source: Source, which: np.ndarray, *, examples: int) -> Captions:
    """The captions of `source`, counted by picture; `which` [records] is the picture of each
    record.

    A caption repeated for one picture does not count. Keeps the `examples` most repeated captions.
    """
    images = which[said.records]
    order = np.lexsort((images, said.keys))
    keys, images = said.keys[order], images[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (images[1:] != images[:-1])
    texts, counts = np.unique(keys[new], return_counts=True)
    repeated = int(np.isin(said.keys, texts[counts > 1]).sum())
    most = np.argsort(-counts, kind="stable")[:examples]
    found = []
    for text, of_images in zip(texts[most].tolist(), counts[most].tolist(), strict=True):
        if of_images > 1:
            record = int(said.records[np.argmax(said.keys == text)])
            captions = map(clean, source.captions(record))
            caption = next(one for one in captions if short_hash(one) == text)
            found.append(Repeated(caption, of_images))
    return Captions(said.lengths, repeated, found, said.unknown)
