"""Pairs in ALBEF's JSON format: a JSON list, or one JSON object a line.

An entry is {"image": path below the image root, "caption": text or list of texts, "image_id": optional int or text};
other keys are passed over. The keys can have other names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from codebook_jax.data.sources.listed import (
    Entry,
    Listed,
    captions_in,
    folders_of,
    keys_of,
    kind_of,
    shown,
)
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

USABLE, CHECK = "usable.jsonl", "check.json"  # what a check of the data writes


class Keys(NamedTuple):
    """What the parts of an entry are called."""

    image: str = "image"
    caption: str = "caption"
    id: str = "image_id"


def json_entries(path: str, keys: Keys) -> Iterator[Entry]:
    """The entries of a file; raises UserError, with the place, for what is not a pair."""
    for where, entry in read_json(path):
        yield _pair(where, entry, keys)


def read_json(path: str) -> Iterator[tuple[str, Any]]:
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
        keys = f" with the keys {keys_of(entries)}" if isinstance(entries, dict) else ""
        raise UserError(
            f"{path} holds a JSON {kind_of(entries)}{keys}, not a list of pairs: "
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


def _pair(where: str, entry: Any, keys: Keys) -> Entry:
    if not isinstance(entry, dict):
        raise UserError(
            f'{where} is a {kind_of(entry)}, not a pair: write {{"image": ..., "caption": ...}}'
        )
    for name, key in (("image", keys.image), ("caption", keys.caption)):
        if key not in entry:
            raise UserError(
                f'{where} has no key "{key}" (its keys: {keys_of(entry)}): name the one that is meant after the '
                f"path, as ?{name}_key=NAME"
            )
    image = entry[keys.image]
    if not isinstance(image, str) or not image:
        raise UserError(
            f'{where}, key "{keys.image}": {shown(image)} is not the path of an image: give a text'
        )
    captions = captions_in(where, keys.caption, entry[keys.caption])
    key = entry.get(keys.id)
    if key is not None and (isinstance(key, bool) or not isinstance(key, int | str)):
        raise UserError(
            f'{where}, key "{keys.id}": {shown(key)} is not an id: give a whole number or a text'
        )
    return Entry(where, image, captions, key)


def open_json(request: Request) -> Listed:
    """`json:PATH`: see the module."""
    options = request.options
    keys = Keys(**{name: options.get(f"{name}_key", default) for name, default in Keys()._asdict().items()})
    folders = folders_of(request.place, request.image_root, request.settings.path_map)
    return Listed(
        "json",
        request.place,
        json_entries(request.place, keys),
        folders,
        merge=request.merge,
        listed=_listed_before(request.place),
    )


def _listed_before(path: str) -> int:
    """How many pairs the usable ones at `path` were found among, where a check left that beside them; else 0."""
    folder, name = os.path.split(path)
    try:
        with open(os.path.join(folder, CHECK), encoding="utf-8") as file:
            check = json.load(file)
    except (OSError, ValueError):
        return 0
    return int(check.get("listed", 0)) if name == USABLE else 0
