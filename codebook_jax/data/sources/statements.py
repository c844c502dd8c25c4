"""Statements that an image entails, contradicts or neither, in ALBEF's lists or SNLI-VE's files.

ALBEF's: {"image": number of Flickr30K, "sentence", "label"}. Official, one object a line:
{"Flikr30kID" or "Flickr30K_ID", "sentence2", "gold_label", "pairID"}.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from codebook_jax.data.sources import listed
from codebook_jax.data.sources.examples import Entry, ListedExamples, key_in, label_in
from codebook_jax.data.sources.json_files import read_json
from codebook_jax.data.sources.record import Example, Request

_NAMES = ("entailment", "neutral", "contradiction")
_LABELS = {name: name for name in _NAMES} | dict(zip("210", _NAMES, strict=True))
_UNDECIDED = "-"  # the annotators disagree
_IMAGES = ("Flikr30kID", "Flickr30K_ID", "image")  # the first is the published spelling
_CURE = (
    'give entries {"image": PATH, "sentence": TEXT, "label": "entailment"}, or with "Flikr30kID", '
    '"sentence2" and "gold_label", as in SNLI-VE'
)
_field = functools.partial(listed.field, cure=_CURE, scheme="entailment")


def open_statements(request: Request) -> ListedExamples:
    """`entailment:PATH`."""
    return ListedExamples(request, "statements", _entries(request), _CURE)


def _entries(request: Request) -> Iterator[Entry]:
    for index, (where, row) in enumerate(read_json(request.place)):
        is_official = isinstance(row, dict) and "sentence2" in row
        text = _field(where, row, "sentence2" if is_official else "sentence", "a sentence")
        image = str(_field(where, row, next(filter(row.__contains__, _IMAGES), "image"), "an id"))
        image += "" if os.path.splitext(image)[1] else ".jpg"
        key = key_in(request, where, row, "pairID", index) if "pairID" in row else index
        name = "gold_label" if "gold_label" in row else "label"
        label, why = (), 'is labelled "-", undecided'
        if row.get(name) != _UNDECIDED:
            label, why = label_in(where, row, name, _LABELS), ""
        yield Entry(where, Example((image,), text, label, key, 0), why)
