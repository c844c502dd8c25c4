"""The captions of a source as the model reads them: how long, and which several pictures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from codebook_jax.data.sources import Source
from codebook_jax.data.sources.texts import short_hash
from codebook_jax.data.text import LONGEST, Tokenizer, clean

_AT_ONCE = 1024  # records
_EXAMPLES = 10  # repeated captions that are named
# per caption: the hash of its text, its record, its tokens with [CLS] and [SEP], unknown ones
_COLUMNS = np.dtype([("key", "u8"), ("record", "i4"), ("tokens", "i2"), ("unknown", "i2")])


def read_captions(
    source: Source, tokenizer: Tokenizer, tell: Callable[[int], None] = lambda records: None
) -> np.ndarray:
    """_COLUMNS of every caption that gives a token; tells how many records it has just read."""
    unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
    columns = [np.empty(0, _COLUMNS)]
    for start in range(0, len(source), _AT_ONCE):
        records = range(start, min(start + _AT_ONCE, len(source)))
        pairs = [(caption, record) for record in records for caption in source.captions(record)]
        readable = set(tokenizer.readable([caption for caption, _ in pairs]))
        pairs = [(caption, record) for caption, record in pairs if caption in readable]
        texts = [caption for caption, _ in pairs]
        read = np.empty(len(pairs), _COLUMNS)
        read["key"] = [short_hash(clean(text)) for text in texts]
        read["record"] = [record for _, record in pairs]
        tokens, read["tokens"], _ = tokenizer.encode(texts, LONGEST)
        read["unknown"] = (tokens == unknown).sum(axis=1)
        columns.append(read)
        tell(len(records))
    return np.concatenate(columns)


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
