"""What the captions of a source are like: how long in tokens, and which are said of several pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from codebook_jax.check_data.inspection import short_hash
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer, clean

LONGEST = 512  # tokens that are told apart
_AT_ONCE = 4096  # captions


class Repeated(NamedTuple):
    """A caption that several pictures have, as the model reads it."""

    caption: str
    images: int


class Captions(NamedTuple):
    """The captions of a source."""

    lengths: np.ndarray  # int64 [LONGEST + 1], how many captions have so many tokens, [CLS] and [SEP] included
    repeated: int  # captions that more than one picture has
    most_repeated: list[Repeated]

    @property
    def count(self) -> int:
        return int(self.lengths.sum())

    def truncated(self, max_tokens: int) -> int:
        """How many captions are longer than the model reads."""
        return int(self.lengths[max_tokens + 1 :].sum())


def read_captions(
    source: Source, which: np.ndarray, tokenizer: Tokenizer, *, examples: int
) -> Captions:
    """Reads every caption; `which` [records] numbers the pictures. At most `examples` repeated ones are kept."""
    lengths = np.zeros(LONGEST + 1, np.int64)
    keys: list[np.ndarray] = []
    records: list[np.ndarray] = []
    texts, owners = [], []

    def read() -> None:
        cleaned = [clean(text) for text in texts]
        _, tokens, _ = tokenizer.encode(texts, LONGEST)
        lengths[:] += np.bincount(tokens, minlength=LONGEST + 1)
        keys.append(np.array([short_hash(text) for text in cleaned], np.uint64))
        records.append(np.array(owners, np.int64))
        texts.clear()
        owners.clear()

    for record in range(len(source)):
        for caption in source.captions(record):
            texts.append(caption)
            owners.append(record)
        if len(texts) >= _AT_ONCE:
            read()
    if texts:
        read()
    return Captions(lengths, *_repeated(source, np.concatenate(keys), np.concatenate(records), which, examples))


def _repeated(
    source: Source, keys: np.ndarray, records: np.ndarray, which: np.ndarray, examples: int
) -> tuple[int, list[Repeated]]:
    """(captions whose text several pictures have, the texts that most have); a picture's own repetition is none."""
    pairs = np.unique(np.stack([keys, which[records].astype(np.uint64)], axis=1), axis=0)
    texts, images = np.unique(pairs[:, 0], return_counts=True)
    several = texts[images > 1]
    count = int(np.isin(keys, several).sum())
    most = np.argsort(-images, kind="stable")[:examples]
    found = []
    for text, of_images in zip(texts[most], images[most], strict=True):
        if of_images > 1:
            record = int(records[np.argmax(keys == text)])
            caption = next(
                cleaned
                for cleaned in map(clean, source.captions(record))
                if short_hash(cleaned) == int(text)
            )
            found.append(Repeated(caption, int(of_images)))
    return count, found
