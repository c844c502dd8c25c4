"""The captions of a source as the model reads them: how long, and which several pictures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.data.text import LONGEST, Tokenizer, clean

_AT_ONCE = 4096  # captions
_EXAMPLES = 10  # repeated captions that are named
# per caption: the hash of its text, its record, its tokens with [CLS] and [SEP], unknown ones
_COLUMNS = np.dtype([("key", "u8"), ("record", "i4"), ("tokens", "i2"), ("unknown", "i2")])


def read_captions(
    source: Source, tokenizer: Tokenizer, tell: Callable[[int], None] = lambda records: None
) -> np.ndarray:
    """_COLUMNS of every caption that gives a token; tells how many records it has just read."""
    found = [np.empty(0, _COLUMNS)]
    batch: list[tuple[str, int]] = []  # (caption, record)
    told = 0
    for record in range(len(source)):
        batch += [(caption, record) for caption in source.captions(record)]
        if len(batch) >= _AT_ONCE or record + 1 == len(source):
            found.append(_read(batch, tokenizer))
            tell(record + 1 - told)
            batch, told = [], record + 1
    return np.concatenate(found)


def _read(batch: list[tuple[str, int]], tokenizer: Tokenizer) -> np.ndarray:
    readable = set(tokenizer.readable([text for text, _ in batch]))
    batch = [(text, record) for text, record in batch if text in readable]
    found = np.empty(len(batch), _COLUMNS)
    found["key"] = [short_hash(clean(text)) for text, _ in batch]
    found["record"] = [record for _, record in batch]
    tokens, found["tokens"], _ = tokenizer.encode([text for text, _ in batch], LONGEST)
    unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
    found["unknown"] = (tokens == unknown).sum(axis=1)
    return found


def repeated_captions(
    captions: np.ndarray, source: Source, which: np.ndarray
) -> tuple[int, list[dict[str, Any]]]:
    """(how many captions more than one picture has, {"caption", "images"} of the most repeated).

    `which` [records] is the picture of each record: a caption repeated for one does not count.
    """
    images = which[captions["record"]]
    order = np.lexsort((images, captions["key"]))
    keys, images = captions["key"][order], images[order]
    new = np.append(True, (np.diff(keys) != 0) | (np.diff(images) != 0))[: len(keys)]
    texts, counts = np.unique(keys[new], return_counts=True)
    repeated = int(np.isin(captions["key"], texts[counts > 1]).sum())
    examples = []
    for at in np.argsort(-counts, kind="stable")[: min(_EXAMPLES, (counts > 1).sum())].tolist():
        first = np.argmax(captions["key"] == texts[at])
        cleaned = map(clean, source.captions(int(captions["record"][first])))
        caption = next(text for text in cleaned if short_hash(text) == texts[at])
        examples.append({"caption": caption, "images": int(counts[at])})
    return repeated, examples
