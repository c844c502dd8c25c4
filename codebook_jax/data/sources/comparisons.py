"""Statements about two images, in ALBEF's lists or NLVR2's official files.

ALBEF's: {"images": [two paths], "sentence", "label": "True" or "False"}. Official, one object a
line: {"identifier": "SPLIT-SET-PAIR-SENTENCE", "sentence", "label", "directory": in training}, with
the pictures SPLIT-SET-PAIR-img0.png and -img1.png.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

from codebook_jax.data.sources import listed
from codebook_jax.data.sources.examples import (
    LOOKED_AT,
    Entry,
    ListedExamples,
    folder_found,
    key_in,
    label_in,
)
from codebook_jax.data.sources.json_files import read_json
from codebook_jax.data.sources.record import Example, Request
from codebook_jax.errors import UserError

_LABELS = {"true": "true", "1": "true", "false": "false", "0": "false"}
# Where the published pictures are; those downloaded one by one are in a single folder.
_LAYOUTS = (
    *("images/{split}/{directory}", "{split}/{directory}", "{directory}"),
    *("images/{split}", "{split}", ""),
)
_IDENTIFIER = re.compile(r"((\w+)-\d+-\d+)-\d+")  # a pair's name, its split
_PICTURE = re.compile(r"((\w+-\d+)-\d+)-img[01]\.\w+")  # a pair's name, its set's
_CURE = (
    'give entries {"images": [LEFT, RIGHT], "sentence": TEXT, "label": "True" or "False"}, or with '
    'an "identifier" SPLIT-SET-PAIR-SENTENCE in place of "images", as in NLVR2'
)
_field = functools.partial(listed.field, cure=_CURE, scheme="nlvr2")


def open_comparisons(request: Request) -> ListedExamples:
    """`nlvr2:PATH`."""
    return ListedExamples(request, "comparisons", _entries(request), _CURE)


def _entries(request: Request) -> Iterator[Entry]:
    rows = read_json(request.place)
    first = list(itertools.islice(rows, LOOKED_AT))
    known = [_pair(where, row) for where, row in first if _is_named(row)]
    layout = folder_found(request, _LAYOUTS, [(f"{pair}-img0.png", its) for pair, its in known])
    sentences: dict[str, dict[str, int]] = {}
    for index, (where, row) in enumerate(itertools.chain(first, rows)):
        text, folder = _field(where, row, "sentence", "a sentence"), ""
        if _is_named(row):
            pair, its = _pair(where, row)
            images, folder = [f"{pair}-img0.png", f"{pair}-img1.png"], layout.format(**its)
        else:
            images = _field(where, row, "images", "a list")
            if len(images) != 2 or not all(isinstance(image, str) for image in images):
                wrong = f"{listed.shown(images)} is not a list of two paths"
                raise UserError(f'{where}, key "images": {wrong}: {_CURE}')
        if "identifier" in row:
            key = key_in(request, where, row, "identifier", index)
        elif pair := _PICTURE.fullmatch(os.path.basename(images[0])):
            # its sentences are numbered as those of its set: the same one is asked of several pairs
            own = sentences.setdefault(pair[2], {})
            key = f"{pair[1]}-{own.setdefault(text, len(own))}"
        else:
            key = index
        label = label_in(where, row, "label", _LABELS)
        yield Entry(where, Example(tuple(images), text, label, key, 0), folder=folder)


def _is_named(row: Any) -> bool:
    """Whether an entry names its pictures by its identifier alone."""
    return isinstance(row, dict) and "identifier" in row and "images" not in row


def _pair(where: str, row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(the name of a pair of pictures, the parts of its folder)"""
    identifier = _field(where, row, "identifier")
    found = _IDENTIFIER.fullmatch(str(identifier))
    if found is None:
        wrong = f"{listed.shown(identifier)} is not SPLIT-SET-PAIR-SENTENCE"
        raise UserError(f'{where}, key "identifier": {wrong}: {_CURE}')
    return found[1], {"split": found[2], "directory": str(row.get("directory", ""))}
