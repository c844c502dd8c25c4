"""Pairs listed in a file, with their images as files below a folder; used by every list format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np

from codebook_jax.data.sources.record import NO_CAPTION, Record, Request, Source, checked
from codebook_jax.data.sources.rows import Parts, names_in
from codebook_jax.data.sources.texts import TextLists, Texts, not_utf8, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

_KINDS = {
    **{"a text": str, "the path of an image": str, "an id": int | str, "a list": list},
    "a sentence": str,  # it may be empty
}
# The scheme that reads entries with these keys; the first that fits.
_READERS = (
    *(("vqa", {"question"}), ("vqa", {"questions"})),
    *(("nlvr2", {"sentence", "images"}), ("nlvr2", {"sentence", "identifier"})),
    *(("entailment", {"gold_label"}), ("entailment", {"sentence", "image"})),
    *(("grounding", {"text", "ref_id"}), ("json", {"caption", "image"})),
    ("coco", {"annotations", "images"}),
)
_CURE = (
    "correct it, name other keys with ?image_key=, ?caption_key= and ?id_key=, or read COCO's "
    "caption files with coco:, Karpathy's splits with karpathy:, Visual Genome with vg:"
)


class Entry(NamedTuple):
    """One entry of a list, as the reader of a format yields it."""

    where: str  # "pairs.json[17]", for messages
    image: str  # as listed: a path below the image root, or one that the path map covers
    captions: tuple[str, ...]  # empty: the entry is left out
    key: int | str | None = None  # identifies the image; None: its path does


class Listed(Source):
    """The entries of a list as a source; those without a caption are left out and counted.

    Entries with the same key (or, without one, the same path) are the same image. For training each
    entry is a record, for evaluation all entries of one key and one path.
    """

    def __init__(self, request: Request, entries: Iterable[Entry]) -> None:
        self.form, self.place, self._folders = request.scheme, request.place, Folders(request)
        self.left_out: list[tuple[str, str]] = []
        entries = self._usable(entries)
        content, keys = hashlib.sha256(f"{self.form} 1".encode()), array("Q")
        self._images, self._captions = Texts(), TextLists()
        for entry in _merged(entries) if request.merge else entries:
            summary = repr((entry.image, entry.captions, entry.key))
            content.update(summary.encode("utf-8", "surrogatepass"))
            keys.append(short_hash(repr(entry.key)))  # a dict of millions of keys takes gigabytes
            self._images.append(entry.image)
            self._captions.append(entry.captions)
        if not len(self):
            without = f" ({self.left_out[0][1]}, ...)" if self.left_out else ""
            cure = "give a file of pairs, or name the key or column of captions"
            raise UserError(f"{self.place} lists no pairs with a caption{without}: {cure}")
        self._ids = numbered(np.frombuffer(keys, np.uint64))[1]
        self._fingerprint = content.hexdigest()
        self.listed = len(self) + len(self.left_out)

    def _usable(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries with captions, with checked paths, which are keys where there is none."""
        for where, listed_image, captions, key in entries:
            image = self._folders.check(where, listed_image)
            if captions:
                yield Entry(where, image, captions, image if key is None else key)
            else:
                self.left_out.append((image, f"{where} {NO_CAPTION}"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        path = self._folders.locate(self.name(index))
        return Record(path, self.captions(index), int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[checked(index, len(self))]

    def name(self, index: int) -> str:
        return self._images[checked(index, len(self))]


def _merged(entries: Iterable[Entry]) -> Iterable[Entry]:
    """The entries, with those of one key and one path merged into one with all their captions."""
    merged: dict[tuple[int | str, str], Entry] = {}
    for entry in entries:
        before = merged.setdefault((entry.key, entry.image), entry)
        if before is not entry:
            further = tuple(new for new in entry.captions if new not in before.captions)
            merged[entry.key, entry.image] = before._replace(captions=before.captions + further)
    return merged.values()


def pair_in(where: str, row: Any, parts: Parts) -> Entry:
    """The pair in a row of a list; raises UserError, naming the row at `where`, if it is none."""
    image = field(where, row, parts.image, "the path of an image")
    captions, key = captions_in(where, row, parts.caption), None
    if row.get(parts.id) not in (None, ""):
        key = field(where, row, parts.id, "an id")
    return Entry(where, image, captions, key)


def field(
    where: str, row: Any, key: str, kind: str = "", *, cure: str = _CURE, scheme: str = "json"
) -> Any:
    """The value at a key of a row; raises UserError, with a cure, if there is none of this kind in
    _KINDS. If the row is one of another scheme, the sentence names that scheme.
    """
    if not isinstance(row, dict):
        raise UserError(f'{where} has no key "{key}" (it is {shown(row)}): {cure}')
    if key not in row:
        readers = (reader for reader, keys in _READERS if keys <= row.keys() and reader != scheme)
        other = "".join(f"read this file with {reader}:, or " for reader in list(readers)[:1])
        raise UserError(f'{where} has no key "{key}" (its keys: {names_in(row)}): {other}{cure}')
    value = row[key]
    is_empty = value == "" and kind != "a sentence"
    if kind and (isinstance(value, bool) or is_empty or not isinstance(value, _KINDS[kind])):
        raise UserError(f'{where}, key "{key}": {shown(value)} is not {kind}: {cure}')
    return value


def captions_in(where: str, row: Any, key: str) -> tuple[str, ...]:
    """The texts with words in the text, or list of texts, at a key of a row, or UserError."""
    captions = field(where, row, key)
    texts = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        value = f'{where}, key "{key}": {shown(captions)}'
        raise UserError(f"{value} is neither a text nor a list of texts: {_CURE}")
    return tuple(filter(has_words, texts))


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


class Folders:
    """Where the images of a list are: below the image root, by default the folder of the list, or
    where the rules "OLD=NEW,OLD=NEW" lead: the longest OLD wins; an empty NEW is the image root.
    """

    def __init__(self, request: Request) -> None:
        self.root = os.path.abspath(request.image_root or os.path.dirname(request.place))
        path_map, rules = request.settings.path_map, []
        for rule in filter(None, map(str.strip, path_map.split(","))):
            old, _, new = rule.rpartition("=")
            if not old:
                raise UserError(
                    f"config.data.path_map={path_map!r}: {rule!r} is not OLD=NEW: give the "
                    "beginning of the listed paths and the folder here, as in /export/vl=/data"
                )
            folder = os.path.abspath(os.path.expanduser(new)) if new else self.root
            rules.append((old.rstrip("/"), folder))
        self._rules = sorted(rules, key=lambda rule: -len(rule[0]))

    def locate(self, image: str) -> str:
        """The path on this machine of an image that `check` has let through."""
        return os.path.join(*self._split(image)[:2])

    def check(self, where: str, image: str, key: str = "image") -> str:
        """A listed path as it is if a rule of the map matches, else relative to the root; raises
        UserError, naming the entry at `where`, if it leads out of the folder or is a URL.
        """
        folder, rest, is_mapped = self._split(image)
        path, inside = os.path.normpath(os.path.join(folder, rest)), folder.rstrip(os.sep) + os.sep
        wrong, scheme = "", image.partition("://")[0]
        if not is_mapped and scheme != image:
            wrong = (
                "is a URL, not a path on this machine: download the images with img2dataset and "
                "read its shards with webdataset:SHARDS.tar, name the column of paths with "
                f"?image_key=, or give --config.data.path_map={scheme}://PLACE=/data"
            )
        elif "\0" in image or not path.startswith(inside):
            wrong = (
                f"is outside the {'mapped folder' if is_mapped else 'image root'} {folder}: set "
                "config.data.image_root to the folder that holds the images, or map the beginning "
                "of the paths to a folder here: --config.data.path_map=/export/home=/data"
            )
        if wrong:
            raise UserError(f'{where}, key "{key}": {image!r} {wrong}')
        return image if is_mapped else path[len(inside) :]

    def _split(self, image: str) -> tuple[str, str, bool]:
        """(folder here, path below it, whether a rule of the map leads there)"""
        for old, folder in self._rules:
            if image.startswith(f"{old}/"):
                return folder, image[len(old) :].lstrip("/"), True
        return self.root, image, False


@contextlib.contextmanager
def open_text(path: str, newline: str | None = None) -> Iterator[TextIO]:
    """A file in UTF-8; raises UserError if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} {not_utf8(failure)}: save it as UTF-8") from failure
    except OSError as failure:
        raise UserError(f"{path} cannot be read ({failure.strerror}): give a file") from failure
