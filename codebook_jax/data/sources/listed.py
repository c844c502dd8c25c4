"""Pairs listed in a file, with their images as files below a folder; used by every list format."""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from codebook_jax.data.sources.paths import Folders
from codebook_jax.data.sources.record import NO_CAPTION, Record, Source, checked
from codebook_jax.data.sources.request import Request
from codebook_jax.data.sources.texts import Packer, not_utf8, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError


class Entry(NamedTuple):
    """One entry of a list, as the reader of a format yields it."""

    where: str  # "pairs.json[17]", for messages
    image: str  # as listed: a path below the image root, or one that the path map covers
    captions: tuple[str, ...]  # empty: the entry is left out
    key: int | str | None = None  # identifies the image; None: its path does


class Listed(Source):
    """The entries of a list as a source.

    Entries with the same key (or, without one, the same path) are the same image. Ids become
    numbers from 0 in the order of the list. For training each entry is a record. For evaluation the
    entries of one key and one path are one record with all their captions. Entries without a
    caption are left out and counted. A missing image file is found when it is read.
    """

    def __init__(self, request: Request, entries: Iterable[Entry], *, listed: int = 0) -> None:
        """`listed` is the size of the list that this one was made from, if that was longer.

        Raises UserError if the list has no entries, or a path leads out of the root.
        """
        self.form, self.place, self._folders = request.scheme, request.place, Folders.of(request)
        self.left_out: list[tuple[str, str]] = []
        entries = self._usable(entries)
        content, keys = hashlib.sha256(f"{self.form} 1".encode()), array("Q")
        images, captions, first = Packer(), Packer(), array("q", [0])
        for entry in _merged(entries) if request.merge else entries:
            key = entry.image if entry.key is None else entry.key
            summary = repr((entry.image, entry.captions, key))
            content.update(summary.encode("utf-8", "surrogatepass"))
            keys.append(short_hash(repr(key)))  # a dict of millions of keys takes gigabytes
            images.add(entry.image)
            for caption in entry.captions:
                captions.add(caption)
            first.append(len(captions))
        if not len(images):
            raise UserError(f"{self.place} {self._nothing()}")
        self._images, self._captions = images.texts(), captions.texts()
        self._first = np.array(first, np.int64)
        self._ids = numbered(np.frombuffer(keys, np.uint64))[1]
        self._fingerprint = content.hexdigest()
        self.listed = max(listed, len(self) + len(self.left_out))

    def _usable(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            entry = entry._replace(image=self._folders.check(entry.where, entry.image))
            if entry.captions:
                yield entry
            else:
                self.left_out.append((entry.image, f"{entry.where} {NO_CAPTION}"))

    def _nothing(self) -> str:
        if not self.left_out:
            return "lists no pairs: give a file with at least one entry"
        count, why = len(self.left_out), self.left_out[0][1]
        cure = "name the key or column of captions, or save the file again as UTF-8"
        return f"lists no pairs with a caption, only {count:,} without (first: {why}): {cure}"

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        path = self._folders.locate(self.name(index))
        return Record(path, self.captions(index), int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return tuple(self._captions[place] for place in range(first, stop))

    def name(self, index: int) -> str:
        return self._images[checked(index, len(self))]


def _merged(entries: Iterable[Entry]) -> Iterable[Entry]:
    """The entries, with those of one key and one path merged into one with all their captions."""
    merged: dict[tuple[int | str, str], Entry] = {}
    for entry in entries:
        key = entry.image if entry.key is None else entry.key, entry.image
        before = merged.setdefault(key, entry)
        if before is not entry:
            further = tuple(new for new in entry.captions if new not in before.captions)
            merged[key] = before._replace(captions=before.captions + further)
    return merged.values()


@contextlib.contextmanager
def open_text(path: str, wanted: str, newline: str | None = None) -> Iterator[TextIO]:
    """A UTF-8 file; if it cannot be read, raises UserError with `wanted`, what to give instead."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} {not_utf8(failure)}: give {wanted}, saved as UTF-8") from failure
    except OSError as failure:
        raise UserError(f"{path} cannot be read ({failure.strerror}): give {wanted}") from failure


def captions_in(where: str, key: str, captions: Any) -> tuple[str, ...]:
    """The texts with words in a text or a list of texts; raises UserError for anything else."""
    texts = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        value = f'{where}, key "{key}": {shown(captions)}'
        raise UserError(f"{value} is neither a text nor a list of texts: give one of them")
    return tuple(text for text in texts if has_words(text))


def keys_of(entry: Mapping[str, Any] | Sequence[str]) -> str:
    """The keys of an entry, for messages."""
    keys = [*map(str, entry)]
    return ", ".join([*keys[:10], *["..."] * (len(keys) > 10)]) or "none"


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
