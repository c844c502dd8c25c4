"""Questions about images, in ALBEF's lists or VQA's official files.

ALBEF's: {"image", "question", "question_id", "answer": [texts] or a text, "dataset": "vqa" or
"vg"}. Official: {"questions": [{"image_id", "question", "question_id"}]} with, in a second file,
{"annotations": [{"question_id", "answers": [{"answer"}]}]}.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from codebook_jax.data.sources import listed
from codebook_jax.data.sources.examples import (
    LOOKED_AT,
    Entry,
    ListedExamples,
    answers_in,
    folder_found,
    key_in,
)
from codebook_jax.data.sources.json_files import read_json
from codebook_jax.data.sources.record import Example, Request
from codebook_jax.data.sources.texts import TextLists
from codebook_jax.errors import UserError

GENOME_WEIGHT = 0.5  # of an answer in Visual Genome; ALBEF
_SPLITS = {name: name for name in ("train2014", "val2014", "test2015")}
_SUBTYPES = _SPLITS | {"test-dev2015": "test2015"}  # "data_subtype" of a file: its pictures
_LAYOUTS = ("", "{split}")
_CURE = (
    'give entries {"image": PATH, "question": TEXT, "question_id": ID, "answer": [TEXTS]}, or the '
    "official questions.json with its answers in ?annotations=FILE"
)
_field = functools.partial(listed.field, cure=_CURE, scheme="vqa")


def open_questions(request: Request) -> ListedExamples:
    """`vqa:PATH`."""
    rows = read_json(request.place)
    first = list(itertools.islice(rows, 1))
    if any(isinstance(row, dict) and "questions" in row for _, row in first):
        entries = _official(request, first.pop()[1])
    elif named := [
        f"?{option}=" for option in ("annotations", "split") if option in request.options
    ]:
        raise UserError(
            f"{request.place} is a list whose entries name their pictures and answers, so leave "
            f"out {', '.join(named)}: it is for the official questions.json"
        )
    else:
        entries = _listed(request, itertools.chain(first, rows))
    return ListedExamples(request, "questions", entries, _CURE)


def _listed(request: Request, rows: Iterable[tuple[str, Any]]) -> Iterator[Entry]:
    for index, (where, row) in enumerate(rows):
        text = _field(where, row, "question", "a sentence")
        image = _field(where, row, "image", "the path of an image")
        key = key_in(request, where, row, "question_id", index)
        weight = GENOME_WEIGHT if row.get("dataset") == "vg" else 1.0
        answers = answers_in(where, row, "answer", _CURE)
        yield Entry(where, Example((image,), text, answers, key, 0, weight))


def _official(request: Request, content: dict[str, Any]) -> Iterator[Entry]:
    path, split = request.place, _split(request, content)
    rows = [
        (f"{path} questions[{number}]", row)
        for number, row in enumerate(_field(path, content, "questions", "a list"))
    ]
    first = [(_image(where, row, split), {"split": split}) for where, row in rows[:LOOKED_AT]]
    folder = folder_found(request, _LAYOUTS, first).format(split=split)
    places, answers = _annotated(request.options.get("annotations"))
    is_any_answered = False
    for where, row in rows:
        text = _field(where, row, "question", "a sentence")
        key = _field(where, row, "question_id", "an id")
        place = places.get(str(key))
        is_any_answered |= place is not None
        own = () if place is None else answers[place]
        yield Entry(where, Example((_image(where, row, split),), text, own, key, 0), folder=folder)
    if places and not is_any_answered:
        raise UserError(
            f"{request.options['annotations']} has no answer to any question of {path}: give the "
            "annotations of the same split"
        )


def _split(request: Request, content: dict[str, Any]) -> str:
    """The part of COCO that has the pictures, as their names have it."""
    if "split" in request.options:
        return request.choice("split", tuple(_SPLITS))
    named = content.get("data_subtype")
    if named not in _SUBTYPES:
        raise UserError(
            f"{request.place} does not say which part of COCO its pictures are from "
            f'("data_subtype" is {listed.shown(named)}): give ?split={" or ".join(_SPLITS)}'
        )
    return _SUBTYPES[named]


def _image(where: str, row: Any, split: str) -> str:
    number = str(_field(where, row, "image_id", "an id"))
    if not number.isdecimal():
        raise UserError(f'{where}, key "image_id": {number!r} is not a number of COCO: correct it')
    return f"COCO_{split}_{int(number):012}.jpg"


def _annotated(path: str | None) -> tuple[dict[str, int], TextLists]:
    """(place of each question id, the answers at each place), read one annotation at a time: the
    file takes gigabytes if it is parsed at once.
    """
    places, answers = {}, TextLists()
    for where, row in read_json(os.path.expanduser(path), "annotations") if path else ():
        places[str(_field(where, row, "question_id", "an id"))] = len(answers)
        given = _field(where, row, "answers", "a list")
        texts = [it.get("answer") if isinstance(it, dict) else it for it in given]
        answers.append(answers_in(where, {"answers": texts}, "answers", _CURE))
    return places, answers
