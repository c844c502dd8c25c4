"""Pairs in ALBEF's JSON format: a JSON list, or one JSON object per line.

An entry is {"image": path below the image root, "caption": text or list of texts, "image_id":
optional int or text}; other keys are ignored. The keys may have other names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from codebook_jax.data.sources.listed import (
    Entry,
    Listed,
    captions_in,
    folders_of,
    keys_of,
    kind_of,
    reading,
    shown,
)
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, parse_json_at

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

USABLE, CHECK = "usable.jsonl", "check.json"  # files that check-data writes
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space
_OTHERS = (  # (keys, the format they belong to, the scheme that reads it)
    ({"images", "annotations"}, "a COCO caption file", "coco"),
    ({"images"}, "a file of Karpathy's splits", "karpathy"),
    ({"regions"}, "Visual Genome", "vg"),
)


class Keys(NamedTuple):
    """The keys of the parts of an entry."""

    image: str = "image"
    caption: str = "caption"
    id: str = "image_id"


def json_entries(path: str, keys: Keys) -> Iterator[Entry]:
    """The entries of a file; raises UserError, naming the entry, if one is not a pair."""
    for where, entry in read_json(path):
        yield _pair(path, where, entry, keys)


def read_json(path: str) -> Iterator[tuple[str, Any]]:
    """("file[3]", entry) of a JSON list, or ("file line 3", entry) of a file with one entry per
    line.
    """
    with _opened(path, "json") as file:
        parts = iter(lambda: file.read(4096), "")
        head = next((part for part in parts if not part.isspace()), "").lstrip()
        if not head:
            raise UserError(f"{path} is empty: give a JSON list of pairs, or one pair per line")
        file.seek(0)
        by_line = head[0] != "[" and (path.endswith(".jsonl") or _is_json(_first_line(file)))
        file.seek(0)
        if by_line:
            yield from _line_entries(path, file)
        else:
            yield from _list_entries(path, file.read(), "json")


def read_list(path: str, scheme: str) -> Iterator[tuple[str, Any]]:
    """("file[3]", entry) of a JSON list; raises UserError, naming what `scheme` reads, for any
    other file.
    """
    with _opened(path, scheme) as file:
        yield from _list_entries(path, file.read(), scheme)


def read_object(path: str, scheme: str) -> dict[str, Any]:
    """The JSON object of a whole file; raises UserError, naming what `scheme` reads, for any other
    file.
    """
    with _opened(path, scheme) as file:
        text = file.read()
    try:
        content = parse_json(text, of_data=True)
    except ValueError as failure:
        raise UserError(_broken(path, failure)) from failure
    if not isinstance(content, dict):
        hint = f": a list of pairs is read with json:{path}" if isinstance(content, list) else ""
        raise UserError(
            f"{path} holds a JSON {kind_of(content)}, but {scheme}: reads an object{hint}"
        )
    return content


@contextlib.contextmanager
def _opened(path: str, scheme: str) -> Iterator[TextIO]:
    wanted = f"the path of a JSON{' or JSONL' * (scheme == 'json')} file after {scheme}:"
    with reading(path, wanted), open(path, encoding="utf-8-sig") as file:
        yield file


def _first_line(lines: Iterator[str]) -> str:
    return next((line for line in lines if not line.isspace()), "")


def _is_json(text: str) -> bool:
    try:
        parse_json(text, of_data=True)
    except json.JSONDecodeError:  # the JSON goes on in another line
        return False
    except ValueError:
        pass  # JSON, but refused by parse_json
    return True


def _list_entries(path: str, text: str, scheme: str) -> Iterator[tuple[str, Any]]:
    """The entries one at a time: parsed at once, they take many times the memory of the text."""
    number = 0
    try:
        at = _SPACE.match(text).end()
        if text[at : at + 1] != "[":
            raise UserError(_no_list(path, parse_json(text, of_data=True), scheme))
        at = _SPACE.match(text, at + 1).end()
        closed = text[at : at + 1] == "]"
        while not closed:
            entry, at = parse_json_at(text, at)
            yield f"{path}[{number}]", entry
            at, number = _SPACE.match(text, at).end(), number + 1
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = at if closed else _SPACE.match(text, at + 1).end()
        end = _SPACE.match(text, at + 1).end()
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except ValueError as failure:
        raise UserError(_broken(path, failure, f"{path}[{number}]")) from failure


def _no_list(path: str, content: Any, scheme: str) -> str:
    keys = f" with the keys {keys_of(content)}" if isinstance(content, dict) else ""
    held = f"{path} holds a JSON {kind_of(content)}{keys}, not a list"
    if scheme != "json":
        return f"{held}, which {scheme}: reads: give the file as it was published"
    return (
        f"{held} of pairs: {_other_scheme(path, content)}"
        'write [{"image": ..., "caption": ...}, ...], or one such object per line'
    )


def _other_scheme(path: str, content: Any) -> str:
    """A hint if another scheme reads the content; else empty."""
    if not isinstance(content, dict):
        return ""
    for keys, whose, scheme in _OTHERS:
        if keys <= content.keys():
            return f"{whose} is read with {scheme}:{path}; or "
    return ""


def _line_entries(path: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            entry = parse_json(line, of_data=True)
        except ValueError as failure:
            raise UserError(_broken(path, failure, f"{path} line {number}", number)) from failure
        yield f"{path} line {number}", entry


def _broken(path: str, failure: ValueError, where: str = "", line: int = 0) -> str:
    """The message; `where` is the entry, and `line` (0: the line in `failure`) where it begins."""
    if not isinstance(failure, json.JSONDecodeError):
        return f"{where or path} cannot be read ({failure}): fix or remove it"
    why = f"{failure.msg.lower()}, column {failure.colno}"
    return f"{path} line {line or failure.lineno} is not JSON ({why}): fix or remove it"


def _pair(path: str, where: str, entry: Any, keys: Keys) -> Entry:
    if not isinstance(entry, dict):
        raise UserError(
            f'{where} is a {kind_of(entry)}, not a pair: write {{"image": ..., "caption": ...}}'
        )
    for name, key in (("image", keys.image), ("caption", keys.caption)):
        if key not in entry:
            raise UserError(
                f'{where} has no key "{key}" (its keys: {keys_of(entry)}): '
                f"{_other_scheme(path, entry)}name the "
                f"right one by adding ?{name}_key=NAME to the path"
            )
    image = entry[keys.image]
    if not isinstance(image, str) or not image:
        raise UserError(
            f'{where}, key "{keys.image}": {shown(image)} is not the path of an image: use a string'
        )
    captions = captions_in(where, keys.caption, entry[keys.caption])
    key = entry.get(keys.id)
    if key is not None and (isinstance(key, bool) or not isinstance(key, int | str)):
        raise UserError(
            f'{where}, key "{keys.id}": {shown(key)} is not an id: use a whole number or a string'
        )
    return Entry(where, image, captions, None if key == "" else key)


def open_json(request: Request) -> Listed:
    """`json:PATH`: see the module.

    For usable.jsonl, the image root is the one recorded by check-data, unless given.
    """
    path, options = request.place, request.options
    keys = Keys(
        **{name: options.get(f"{name}_key", default) for name, default in Keys()._asdict().items()}
    )
    check = _check_beside(path)
    root = options.get("image_root") or check.image_root or request.image_root
    folders = folders_of(path, root, request.settings.path_map)
    entries = json_entries(path, keys)
    return Listed("json", path, entries, folders, merge=request.merge, listed=check.listed)


class _Check(NamedTuple):
    """What check.json says about the usable.jsonl beside it."""

    listed: int = 0  # pairs checked, usable or not
    image_root: str = ""


def _check_beside(path: str) -> _Check:
    folder, name = os.path.split(path)
    if name != USABLE:
        return _Check()
    try:
        with open(os.path.join(folder, CHECK), encoding="utf-8") as file:
            check = parse_json(file.read())
        return _Check(int(check["listed"]), str(check.get("image_root") or ""))
    except (OSError, ValueError, KeyError, TypeError):
        return _Check()
