"""Examples listed in a file, with their pictures as files below a folder; used by every format of a
task with pictures, a text and answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources.listed import Folders, field, shown
from codebook_jax.data.sources.record import KINDS, Example, Request, Source, checked
from codebook_jax.data.sources.texts import TextLists, Texts, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

ANSWERED = ("questions", "comparisons", "statements")  # kinds that are learned from the answers
LOOKED_AT = 16  # entries whose pictures are looked for, to learn which folder has them


class Entry(NamedTuple):
    """One entry of a list, as the reader of a format yields it."""

    where: str  # "questions.json[17]", for messages
    example: Example  # with the listed names of its pictures; the image id is not used
    lacks: str = ""  # why it is left out
    folder: str = ""  # of its pictures, where a list does not say; it is no part of the content


class ListedExamples(Source):
    """The entries of a list as examples. Those with a text without words and, in training, those
    without an answer are left out and counted.
    """

    def __init__(self, request: Request, kind: str, entries: Iterable[Entry], cure: str) -> None:
        """`kind` is one of KINDS; raises UserError, with a cure, if no entry is left."""
        self.form, self.place, self.kind = request.scheme, request.place, kind
        self._folders, self.left_out = Folders(request), []
        # per example: the paths of its pictures, and all else but the image id as JSON
        self._images, self._told, firsts = TextLists(), Texts(), array("Q")
        content = hashlib.sha256(f"{self.form} examples 1".encode())
        for where, example, why, folder in entries:
            key = "image" if len(example.images) == 1 else "images"
            listed = (os.path.join(folder, name) for name in example.images)
            images = [self._folders.check(where, image, key) for image in listed]
            if why := why or lacks(example, kind, request.role):
                self.left_out.append((_name(example.key, images), f"{where} {why}"))
                continue
            told = json.dumps(example[1:], ensure_ascii=False)
            content.update(repr((example.images, told)).encode("utf-8", "surrogatepass"))
            firsts.append(short_hash(images[0]))
            self._images.append(images)
            self._told.append(told)
        if not len(self):
            without = f" (first left out: {self.left_out[0][1]})" if self.left_out else ""
            raise UserError(f"{self.place} lists no {KINDS[kind][0]} to read{without}: {cure}")
        self._ids = numbered(np.frombuffer(firsts, np.uint64))[1]
        self._fingerprint = content.hexdigest()
        self.listed = len(self) + len(self.left_out)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        images = map(self._folders.locate, self.pictures(index))
        example = Example(tuple(images), *map(frozen, json.loads(self._told[index])))
        return example._replace(image_id=int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        text, answers, *_ = json.loads(self._told[checked(index, len(self))])
        return texts_of(text, answers)

    def name(self, index: int) -> str:
        """The key of the example, then its pictures."""
        images = self.pictures(index)
        return _name(json.loads(self._told[index])[2], images)

    def pictures(self, index: int) -> tuple[str, ...]:
        return self._images[checked(index, len(self))]


def lacks(example: Example, kind: str, role: str) -> str:
    """What an example of this kind lacks to be used in this role, or ""."""
    if kind != "labels" and not has_words(example.text):
        return "has no text with words"
    if kind in ANSWERED and role == "train" and not any(map(has_words, example.answers)):
        return "has no answer to train on"
    return ""


def texts_of(text: str, answers: Iterable[str]) -> tuple[str, ...]:
    """The text and the distinct answers, as far as they have words."""
    return tuple(filter(has_words, (text, *dict.fromkeys(answers))))


def frozen(value: Any) -> Any:
    """A value with tuples in place of the lists that JSON and msgpack return."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def key_in(request: Request, where: str, row: Mapping[str, Any], key: str, index: int) -> int | str:
    """The id at a key of a row, or in training without one the place of the row in its file."""
    if key not in row and request.role == "train":
        return index
    cure = "an id, a text or a whole number, names an answer in a submission: add it"
    return field(where, row, key, "an id", cure=cure, scheme=request.scheme)


def answers_in(where: str, row: Mapping[str, Any], key: str, cure: str) -> tuple[str, ...]:
    """The texts or numbers at a key of a row as texts, none without the key; raises UserError, with
    a cure, for anything else.
    """
    value = row.get(key)
    answers = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if any(isinstance(it, bool) or not isinstance(it, int | str) for it in answers):
        wrong = f'{where}, key "{key}": {shown(value)} is neither a text nor a list of texts'
        raise UserError(f"{wrong}: {cure}")
    return tuple(map(str, answers))


def label_in(
    where: str, row: Mapping[str, Any], key: str, labels: Mapping[str, str]
) -> tuple[str, ...]:
    """The label at a key of a row, by how it may be written in lower case, or none without the key;
    raises UserError for another.
    """
    value = row.get(key)
    if value in (None, ""):
        return ()
    label = labels.get(str(value).lower())
    if label is None:
        known = ", ".join(dict.fromkeys(labels.values()))
        raise UserError(f'{where}, key "{key}": {shown(value)} is not a label: use {known}')
    return (label,)


def folder_found(
    request: Request, layouts: Sequence[str], known: Sequence[tuple[str, Mapping[str, Any]]]
) -> str:
    """The first layout, such as "images/{split}", in which one of the pictures of which some are
    `known`, by name and what fills the layout, is a file; without any, the first of all.
    """
    folders = Folders(request)
    for layout in layouts:
        places = (os.path.join(layout.format(**parts), name) for name, parts in known)
        if any(map(os.path.exists, map(folders.locate, places))):
            return layout
    return layouts[0]


def _name(key: int | str, images: Sequence[str]) -> str:
    return " ".join(dict.fromkeys((str(key), *images)))
