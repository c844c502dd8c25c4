"""Pairs listed in a file, with their images as files below a folder; used by every list format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from codebook_jax.data.sources.record import NO_CAPTION, NamedSource, Record, Request, checked
from codebook_jax.data.sources.texts import Packer, not_utf8, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError


class Entry(NamedTuple):
    """One entry of a list, as the reader of a format yields it."""

    where: str  # "pairs.json[17]", for messages
    image: str  # as listed: a path below the image root, or one that the path map covers
    captions: tuple[str, ...]  # empty: the entry is left out
    key: int | str | None = None  # identifies the image; None: its path does


class Listed(NamedSource):
    """The entries of a list as a source; those without a caption are left out and counted.

    Entries with the same key (or, without one, the same path) are the same image, whose id is its
    number from 0 in the order of the list. For training each entry is a record, for evaluation all
    entries of one key and one path. A missing image file is found when it is read.
    """

    def __init__(self, request: Request, entries: Iterable[Entry], *, listed: int = 0) -> None:
        """`listed` is the size of the list that this one was made from, if that was longer."""
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


class Folders(NamedTuple):
    """Where the images of a list are: below the image root, or where the path map leads."""

    root: str  # absolute
    path_map: tuple[tuple[str, str], ...] = ()  # (OLD, folder here), longest OLD first

    @classmethod
    def of(cls, request: Request) -> Folders:
        """The image root, by default the folder of the list, and the rules "OLD=NEW,OLD=NEW": the
        longest OLD wins; an empty NEW is the image root.
        """
        root = os.path.abspath(request.image_root or os.path.dirname(request.place))
        path_map, pairs = request.settings.path_map, []
        for rule in filter(None, (part.strip() for part in path_map.split(","))):
            old, equals, new = rule.rpartition("=")
            if not equals or not old:
                raise UserError(
                    f"config.data.path_map={path_map!r}: {rule!r} is not OLD=NEW: give the "
                    "beginning of the listed paths and the folder here, as in /export/vl=/data"
                )
            new = os.path.abspath(os.path.expanduser(new)) if new else root
            pairs.append((old.rstrip("/"), new))
        return cls(root, tuple(sorted(pairs, key=lambda pair: -len(pair[0]))))

    def locate(self, image: str) -> str:
        """The path on this machine of an image that `check` has let through."""
        mapped = self._mapped(image)
        return os.path.join(self.root, image if mapped is None else mapped)

    def check(self, where: str, image: str) -> str:
        """A listed path as it is if a rule of the map matches, else relative to the root; raises
        UserError, naming the entry at `where`, if it leads out of the folder.
        """
        parts, entry = image.split("/"), f'{where}, key "image": {image!r}'
        if self._mapped(image) is not None:
            if ".." in parts or "\0" in image:
                folder = "the folder that config.data.path_map gives"
                raise UserError(f'{entry} may lead out of {folder}: give paths without ".."')
            return image
        if not os.path.isabs(image) and "." not in parts and ".." not in parts:
            if "//" not in image and "\0" not in image:
                return image
        scheme, is_address, _ = image.partition("://")
        if is_address and scheme.lower() in ("http", "https"):
            raise UserError(
                f"{entry} is a URL, not a file: download the images with img2dataset and read its "
                "shards with webdataset:SHARDS.tar, or name the column of paths with ?image_key="
            )
        if is_address:
            raise UserError(
                f"{entry} is not a path on this machine: map its beginning to a folder here, for "
                f"example --config.data.path_map={scheme}://PLACE=/data"
            )
        path = os.path.normpath(os.path.join(self.root, image))
        if "\0" in path or not path.startswith(self.root.rstrip(os.sep) + os.sep):
            raise UserError(
                f"{entry} is outside the image root {self.root}: set config.data.image_root to the "
                "folder that holds the images, or map the beginning of the paths to a folder here, "
                "for example --config.data.path_map=/export/home=/data"
            )
        return os.path.relpath(path, self.root)

    def _mapped(self, image: str) -> str | None:
        """The path with its beginning replaced; None if no rule of the map matches."""
        for old, new in self.path_map:
            if image.startswith(f"{old}/"):
                return os.path.join(new, image[len(old) :].lstrip("/"))
        return None


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
