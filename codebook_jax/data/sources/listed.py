"""Pairs listed in a file, with their images as files below a folder; used by every list format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codebook_jax.data.sources.record import Record, checked
from codebook_jax.data.sources.texts import Packer, Texts, not_utf8, numbered, short_hash
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

NO_CAPTION = "has no caption with words"


class Entry(NamedTuple):
    """One entry of a list, as the reader of a format yields it."""

    where: str  # "pairs.json[17]", for messages
    image: str  # as listed: a path below the image root, or one that the path map covers
    captions: tuple[str, ...]  # empty: the entry is left out
    key: int | str | None  # identifies the image; None: its path does


class Folders(NamedTuple):
    """Where the images of a list are."""

    root: str  # absolute
    path_map: tuple[
        tuple[str, str], ...
    ] = ()  # (beginning of listed paths, folder here); longest first


class Listed:
    """The entries of a list as a source.

    Entries with the same key (or, without one, the same path) are the same image. Ids become
    numbers from 0 in the order of the list. For training each entry is a record. For evaluation
    (`merge`) the entries of one key and one path are one record with all their captions, so that an
    image listed once per caption is one image.

    Entries without a caption that has words are left out and counted. Image files are not opened
    here: a missing one is found and counted when it is read.
    """

    def __init__(
        self,
        form: str,
        path: str,
        entries: Iterable[Entry],
        folders: Folders,
        *,
        merge: bool,
        listed: int = 0,
    ) -> None:
        """`form` is the scheme. `listed` (0: the number of entries) is the size of the list that
        this one was made from.

        Raises UserError if the list has no entries, or a path leads out of the root.
        """
        self._form, self._path, self._folders = form, path, folders
        self.left_out: list[tuple[str, str]] = []
        entries = self._with_captions(_placed(entries, folders))
        if merge:
            entries = _merged(entries)
        summary = _Summary(form)
        self._images, self._captions, self._first = _columns(summary.of(entries))
        if not len(self._images):
            why = "lists no pairs: give a file with at least one entry"
            if self.left_out:
                why = (
                    f"lists no pairs with a caption: none of {len(self.left_out):,} has words "
                    f"(first: {self.left_out[0][1]}): name the key or column of captions, or save "
                    "the file again as UTF-8"
                )
            raise UserError(f"{path} {why}")
        self._ids, self._fingerprint = summary.ids(), summary.fingerprint()
        self.listed = max(listed, len(self) + len(self.left_out))

    def _with_captions(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        for entry in entries:
            if entry.captions:
                yield entry
            else:
                self.left_out.append((entry.image, f"{entry.where} {NO_CAPTION}"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        path = located(self.name(index), self._folders)
        return Record(path, self.captions(index), int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        first, stop = self._first[checked(index, len(self)) :][:2]
        return tuple(self._captions[at] for at in range(first, stop))

    def name(self, index: int) -> str:
        return self._images[checked(index, len(self))]

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"{self._form}({self._path!r}, images={len(self)})"


class _Summary:
    """Collects the number and a hash of every entry that passes."""

    def __init__(self, form: str) -> None:
        self._digest = hashlib.sha256(f"{form} 1".encode())
        self._keys = array("Q")  # a 64-bit hash of each: a dict of millions of keys takes gigabytes

    def of(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        for entry in entries:
            key = entry.image if entry.key is None else entry.key
            content = repr((entry.image, entry.captions, key))
            self._digest.update(content.encode("utf-8", "surrogatepass"))
            self._keys.append(short_hash(repr(key)))
            yield entry

    def ids(self) -> np.ndarray:
        """int32 [entries]: the number of each entry's key, from 0 in order of first appearance."""
        return numbered(np.frombuffer(self._keys, np.uint64))[1]

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def folders_of(path: str, image_root: str, path_map: str) -> Folders:
    """`image_root` (empty: the folder of the list at `path`), and the rules of "OLD=NEW,OLD=NEW".

    If several rules match a path, the longest OLD wins. An empty NEW is the image root. Raises
    UserError for a malformed rule.
    """
    root = os.path.abspath(os.path.expanduser(image_root) or os.path.dirname(path))
    pairs = []
    for rule in filter(None, (part.strip() for part in path_map.split(","))):
        old, equals, new = rule.rpartition("=")
        if not equals or not old:
            raise UserError(
                f"config.data.path_map={path_map!r}: {rule!r} is not OLD=NEW: give the beginning "
                "of the listed paths and the folder here, for example /export/home/vl=/data; "
                "separate several with commas"
            )
        pairs.append((old.rstrip("/"), os.path.abspath(os.path.expanduser(new)) if new else root))
    return Folders(root, tuple(sorted(pairs, key=lambda pair: -len(pair[0]))))


def located(image: str, folders: Folders) -> str:
    """The path of an entry's image on this machine."""
    mapped = _mapped(image, folders.path_map)
    return os.path.join(folders.root, image if mapped is None else mapped)


@contextlib.contextmanager
def reading(path: str, wanted: str) -> Iterator[None]:
    """Raises UserError with one sentence if the file at `path` cannot be read; `wanted` is what to
    give instead.
    """
    try:
        yield
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} {not_utf8(failure)}: give {wanted}, saved as UTF-8") from failure
    except OSError as failure:
        raise UserError(f"{path} cannot be read ({failure.strerror}): give {wanted}") from failure


def captions_in(where: str, key: str, captions: Any) -> tuple[str, ...]:
    """A text or a list of texts as captions, leaving out those without words; raises UserError for
    anything else.
    """
    texts = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f'{where}, key "{key}": {shown(captions)} is neither a text nor a list of texts: give '
            "one of them"
        )
    return tuple(text for text in texts if has_words(text))


def keys_of(entry: Mapping[str, Any] | Sequence[str]) -> str:
    """The keys of an entry, for messages."""
    keys = list(map(str, entry))
    more = ", ..." if len(keys) > 10 else ""
    return (", ".join(keys[:10]) + more) or "none"


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _placed(entries: Iterable[Entry], folders: Folders) -> Iterable[Entry]:
    """The entries with their paths below the root; raises UserError for one that leads out of
    it.
    """
    for entry in entries:
        if _mapped(entry.image, folders.path_map) is None:
            entry = entry._replace(image=_below(entry.where, entry.image, folders.root))
        elif ".." in entry.image.split("/") or "\0" in entry.image:
            raise UserError(
                f'{entry.where}, key "image": {entry.image!r} may lead out of the folder that '
                "config.data.path_map "
                'gives: give paths without ".."'
            )
        yield entry


def _merged(entries: Iterable[Entry]) -> Iterable[Entry]:
    """The entries, with those of one key and one path merged into one with all their captions."""
    merged: dict[tuple[int | str, str], Entry] = {}
    for entry in entries:
        key = entry.image if entry.key is None else entry.key, entry.image
        before = merged.setdefault(key, entry)
        if before is not entry:
            further = tuple(new for new in entry.captions if new not in before.captions)
            merged[key] = before._replace(captions=before.captions + further)
    yield from merged.values()


def _columns(entries: Iterable[Entry]) -> tuple[Texts, Texts, np.ndarray]:
    """(images, captions, int64 [entries + 1]: the first caption of each), read once."""
    images, captions, first = Packer(), Packer(), array("q", [0])
    for entry in entries:
        images.add(entry.image)
        for caption in entry.captions:
            captions.add(caption)
        first.append(len(captions))
    return images.texts(), captions.texts(), np.array(first, np.int64)


def _mapped(image: str, path_map: tuple[tuple[str, str], ...]) -> str | None:
    """The path with its beginning replaced; None if no rule of the map matches."""
    for old, new in path_map:
        if image.startswith(f"{old}/"):
            return os.path.join(new, image[len(old) :].lstrip("/"))
    return None


def _below(where: str, image: str, root: str) -> str:
    """The path relative to the root; raises UserError for one that leads out of it."""
    if not os.path.isabs(image) and "." not in image.split("/") and ".." not in image.split("/"):
        if "//" not in image and "\0" not in image:
            return image
    if "://" in image:
        raise UserError(f'{where}, key "image": {image!r} is {_cure_of_address(image)}')
    path = os.path.normpath(os.path.join(root, image))
    if "\0" in path or not path.startswith(root.rstrip(os.sep) + os.sep):
        raise UserError(
            f'{where}, key "image": {image!r} is outside the image root {root}: give paths below '
            "it, "
            "set config.data.image_root to the folder that holds the images, or map the beginning "
            "of the "
            "paths to a folder here, for example --config.data.path_map=/export/home=/data"
        )
    return os.path.relpath(path, root)


def _cure_of_address(image: str) -> str:
    """The message for an address in place of a path."""
    scheme = image.partition("://")[0]
    if scheme.lower() in ("http", "https"):
        return (
            "a URL, not a file: download the images with img2dataset and read its shards with "
            "webdataset:SHARDS.tar, or name the column or key of the paths on this machine with "
            "?image_key=NAME"
        )
    return (
        "not a path on this machine: map its beginning to a folder here, for example "
        f"--config.data.path_map={scheme}://PLACE=/data"
    )
