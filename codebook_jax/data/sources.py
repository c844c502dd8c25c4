"""Where images and captions come from: the built-in scenes, and JSON files in ALBEF's format.

A source is read by index, so any process and any worker can read any part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from codebook_jax.data import scenes
from codebook_jax.errors import UserError

ROLES = ("train", "validation", "test")
FORMS = "scenes, scenes:hard, json:path/to/pairs.json(l)"


class Record(NamedTuple):
    """An image with all its captions."""

    image: np.ndarray | bytes | str  # uint8 RGB [H, W, 3], or the bytes of a file, or its path
    captions: tuple[str, ...]
    image_id: int  # equal where the image is the same one


class Source(Protocol):
    """Records by index. It can be pickled and read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises UnreadableImage where the source itself must read the image and cannot."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of record `index`, without making its image."""

    def fingerprint(self) -> str:
        """A hash of the content: equal in every process and under every path."""

    def __repr__(self) -> str:
        """What the source is, without addresses."""


def open_source(
    spec: str, *, role: str, size_px: int, scenes_examples: int, image_root: str, seed: int
) -> Source:
    """The source that `spec` names, as `role` ("train", "validation" or "test") uses it.

    `scenes_examples` and `seed` are of training's scenes: the scenes of validation and test are the same in every
    run, so that runs can be compared. Raises UserError for what cannot be opened.
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r} is none of {ROLES}")
    scheme, _, rest = spec.partition(":")
    if scheme == "json" and rest:
        return JsonSource(rest, image_root=image_root, merge=role != "train")
    if spec == "scenes" and role == "train":
        if scenes_examples < 1:
            raise UserError(
                f"config.data.scenes_examples={scenes_examples} leaves nothing to train on: give at least 1"
            )
        return TrainingScenes(scenes_examples, seed, size_px)
    if spec == "scenes":
        return EvaluationScenes(role, size_px)
    if spec == "scenes:hard" and role == "train":
        raise UserError(
            "scenes:hard is for evaluation alone: train on scenes, and name it in config.data.eval "
            "or config.data.test"
        )
    if spec == "scenes:hard":
        return EvaluationScenes(role, size_px, hard=True)
    hint = f"did you mean json:{spec}" if spec.endswith((".json", ".jsonl")) else f"use {FORMS}"
    raise UserError(f"{spec!r} names no source of {role} data: {hint}")


class TrainingScenes:
    """`examples` scenes to train on, drawn by `seed`, with four captions each."""

    def __init__(self, examples: int, seed: int, size_px: int) -> None:
        self._examples, self._seed, self._size_px = examples, seed, size_px

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Record:
        scene = scenes.training_scene(self._seed, _checked(index, len(self)))
        image = scenes.render(scene, self._size_px)
        return Record(image, scenes.training_captions(scene), index)

    def captions(self, index: int) -> tuple[str, ...]:
        scene = scenes.training_scene(self._seed, _checked(index, len(self)))
        return scenes.training_captions(scene)

    def fingerprint(self) -> str:
        return _hash([f"scenes {scenes.WORLD} train {self._seed} {self._examples}"])

    def __repr__(self) -> str:
        return f"scenes(train, seed={self._seed}, examples={self._examples})"


class EvaluationScenes:
    """The 1000 scenes of one split, each with one caption: the plain ones, or the hard pairs."""

    def __init__(self, split: str, size_px: int, *, hard: bool = False) -> None:
        self._split, self._size_px, self._hard = split, size_px, hard
        self._scenes = scenes.hard_scenes(split) if hard else scenes.evaluation_scenes(split)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        scene, caption = self._scenes[_checked(index, len(self))]
        return Record(scenes.render(scene, self._size_px), (caption,), index)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._scenes[_checked(index, len(self))][1],)

    def fingerprint(self) -> str:
        return _hash([f"scenes {scenes.WORLD} {self._split} hard={self._hard} {len(self)}"])

    def __repr__(self) -> str:
        return f"scenes{':hard' if self._hard else ''}({self._split})"


class JsonSource:
    """Pairs listed in a file: a JSON list, or one JSON object a line, as ALBEF's files.

    An entry is {"image": path below the image root, "caption": text or list of texts, "image_id": optional int or
    text}; other keys are passed over. Entries with the same `image_id` are the same image; where it is missing the
    image's path stands for it. Ids become numbers from 0 in the order of the file.

    To train on, each entry is a record. To evaluate (`merge`), the entries of one id and one path are one record
    with all their captions, so that an image listed once a caption is one image.

    Image files are not looked at here: one that is missing is found when it is read, and counted then.
    """

    def __init__(self, path: str | os.PathLike, *, image_root: str = "", merge: bool) -> None:
        self._path = os.fspath(path)
        folder = image_root or os.path.dirname(self._path)
        self._root = os.path.abspath(folder)
        self._images: list[str] = []  # below the root, one text object an image
        self._captions: list[str | tuple[str, ...]] = []
        ids: dict[Any, int] = {}
        numbers: list[int] = []
        names: dict[str, str] = {}
        merged: dict[tuple[int, str], int] = {}
        digest = hashlib.sha256(b"json 1")
        for where, entry in _entries(self._path):
            image, captions, key = _pair(where, entry, self._root)
            digest.update(repr((image, captions, key)).encode("utf-8", "surrogatepass"))
            image = names.setdefault(image, image)
            number = ids.setdefault(key, len(ids))
            at = merged.setdefault((number, image), len(self._images)) if merge else -1
            if 0 <= at < len(self._images):
                before = self._captions[at]
                before = (before,) if isinstance(before, str) else before
                self._captions[at] = (*before, *(new for new in captions if new not in before))
                continue
            self._images.append(image)
            self._captions.append(captions[0] if len(captions) == 1 else captions)
            numbers.append(number)
        if not self._images:
            raise UserError(f"{self._path} lists no pairs: give a file with at least one entry")
        self._ids = np.array(numbers, np.int32)
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        captions = self.captions(index)
        path = os.path.join(self._root, self._images[index])
        return Record(path, captions, int(self._ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        captions = self._captions[_checked(index, len(self))]
        return (captions,) if isinstance(captions, str) else captions

    def fingerprint(self) -> str:
        return self._fingerprint

    def __repr__(self) -> str:
        return f"json({self._path!r}, images={len(self)})"


def _entries(path: str) -> Iterator[tuple[str, Any]]:
    """("file[3]", entry) of a JSON list, or ("file line 3", entry) of a file with one entry a line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if not line.isspace()), "")
            file.seek(0)
            if not first:
                raise UserError(f"{path} is empty: give a JSON list of pairs, or one a line")
            if first.lstrip()[0] == "[":
                yield from _list_entries(path, file.read())
            elif path.endswith(".jsonl") or _is_json(first):
                yield from _line_entries(path, file)
            else:
                yield from _list_entries(path, file.read())
    except UnicodeDecodeError as failure:
        raise UserError(
            f"{path} is not UTF-8 text ({failure.reason} at byte {failure.start}): "
            "give a JSON or JSONL file"
        ) from failure
    except OSError as failure:
        raise UserError(
            f"{path} cannot be read ({failure.strerror}): give the path of a JSON or JSONL file after json:"
        ) from failure


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _list_entries(path: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(text)
    except ValueError as failure:
        raise UserError(_broken(path, failure.lineno, failure)) from failure
    if not isinstance(entries, list):
        keys = f" with the keys {_listed(entries)}" if isinstance(entries, dict) else ""
        raise UserError(
            f"{path} holds a JSON {_kind(entries)}{keys}, not a list of pairs: "
            'write [{"image": ..., "caption": ...}, ...], or one such object a line'
        )
    for number, entry in enumerate(entries):
        yield f"{path}[{number}]", entry


def _line_entries(path: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            entry = json.loads(line)
        except ValueError as failure:
            raise UserError(_broken(path, number, failure)) from failure
        yield f"{path} line {number}", entry


def _broken(path: str, line: int, failure: ValueError) -> str:
    why = f"{failure.msg.lower()}, column {failure.colno}"
    return f"{path} line {line} is not JSON ({why}): mend or remove it"


def _pair(where: str, entry: Any, root: str) -> tuple[str, tuple[str, ...], int | str]:
    """(path below the root, captions, what names the image) of an entry; raises UserError saying what is off."""
    if not isinstance(entry, dict):
        raise UserError(
            f'{where} is a {_kind(entry)}, not a pair: write {{"image": ..., "caption": ...}}'
        )
    for key in ("image", "caption"):
        if key not in entry:
            raise UserError(
                f'{where} has no key "{key}" (its keys: {_listed(entry)}): rename the one that is meant'
            )
    image, captions = entry["image"], entry["caption"]
    if not isinstance(image, str) or not image:
        raise UserError(
            f'{where}, key "image": {_shown(image)} is not the path of an image: give a text'
        )
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(
            f'{where}, key "caption": {_shown(captions)} is neither a text nor a list of texts: give one of them'
        )
    if not captions or not all(text.strip() for text in captions):
        raise UserError(
            f'{where}, key "caption" has an empty caption: give a text, or remove the entry'
        )
    below = _below(where, image, root)
    key = entry.get("image_id")
    if key is None:
        key = below
    elif isinstance(key, bool) or not isinstance(key, int | str):
        raise UserError(
            f'{where}, key "image_id": {_shown(key)} is not an id: give a whole number or a text'
        )
    return below, tuple(captions), key


def _below(where: str, image: str, root: str) -> str:
    """The path as it is below the root; raises UserError for one that leads out of it."""
    if not os.path.isabs(image) and "." not in image.split("/") and ".." not in image.split("/"):
        if "//" not in image and "\0" not in image:
            return image
    path = os.path.normpath(os.path.join(root, image))
    if "\0" in path or not path.startswith(root.rstrip(os.sep) + os.sep):
        raise UserError(
            f'{where}, key "image": {image!r} is outside the image root {root}: give paths below it, '
            "or set config.data.image_root to the folder that holds the images"
        )
    return os.path.relpath(path, root)


def _listed(entry: dict[str, Any]) -> str:
    keys = list(map(str, entry))
    more = ", ..." if len(keys) > 10 else ""
    return (", ".join(keys[:10]) + more) or "none"


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
    return index


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
