"""Pairs in ALBEF's JSON format, a JSON list or one JSON object per line; and how the other JSON
formats are read.

An entry is {"image": path below the image root, "caption": text or list of texts, "image_id":
optional int or text}; other keys are ignored. The keys may have other names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from codebook_jax.data.sources.listed import Entry, Listed, keys_of, open_text
from codebook_jax.data.sources.record import Request
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, parse_json_at

USABLE, CHECK = "usable.jsonl", "check.json"  # files that check-data writes
KINDS = {"a text": str, "the path of an image": str, "an id": int | str, "a list": list}
_SPACE = r"[ \t\n\r]*"  # white space as in JSON
_BEFORE = re.compile(rf"{_SPACE}(\[{_SPACE}(\]?){_SPACE})?")
_BETWEEN = re.compile(rf"{_SPACE}([],]?){_SPACE}")
_OTHERS = (  # (keys, the format they belong to, the scheme that reads it)
    ({"images", "annotations"}, "a COCO caption file", "coco"),
    ({"images"}, "a file of Karpathy's splits", "karpathy"),
    ({"regions"}, "Visual Genome", "vg"),
)


def open_json(request: Request) -> Listed:
    """`json:PATH`; for usable.jsonl, the image root is the one that check-data recorded."""
    usual = {"image": "image", "caption": "caption", "id": "image_id"}
    keys = {part: key or usual[part] for part, key in request.keys.items()}
    listed, image_root = _checked(request.place)
    if image_root:  # one in the options still wins
        request = request._replace(settings=request.settings._replace(image_root=image_root))
    entries = (_pair(where, entry, keys) for where, entry in read_json(request.place))
    return Listed(request, entries, listed=listed)


def read_json(path: str, scheme: str = "json") -> Iterator[tuple[str, Any]]:
    """("file[3]", entry) of a JSON list, or for json: ("file line 3", entry) of one entry after the
    other. Raises UserError, naming what `scheme` reads, for any other file.

    Entries are parsed one at a time: parsed at once, they take many times the memory of the text.
    """
    wanted = f"the path of a JSON{' or JSONL' * (scheme == 'json')} file after {scheme}:"
    with open_text(path, wanted) as file:
        text = file.read()
    found = _BEFORE.match(text)
    in_list, ended, after = bool(found[1]), found[2] == "]", found.end()
    if after == len(text) and not in_list:
        raise UserError(f"{path} is empty: give a JSON list, or for json: one pair per line")
    if not in_list and scheme != "json":
        held = f"{path} holds {_shown(_parsed(path, text))}"
        raise UserError(f"{held}, but {scheme}: reads a JSON list: give the published file")
    number, line = 0, 1 + text.count("\n", 0, after)
    try:
        while not ended and (in_list or after < len(text)):
            entry, end = parse_json_at(text, after)
            yield f"{path}[{number}]" if in_list else f"{path} line {line}", entry
            found, number = _BETWEEN.match(text, end), number + 1
            ended = in_list and found[1] == "]"
            if in_list != bool(found[1]):
                kind = "Expecting ',' delimiter" if in_list else "Extra data"
                raise json.JSONDecodeError(kind, text, found.end())
            line += text.count("\n", after, found.end())
            after = found.end()
        if after < len(text):
            raise json.JSONDecodeError("Extra data", text, after)
    except ValueError as failure:
        raise _broken(
            f"{path}[{number}]" if in_list else f"{path} line {line}", failure
        ) from failure


def read_object(path: str, scheme: str) -> dict[str, Any]:
    """The JSON object of a whole file; raises UserError, naming `scheme`, for another."""
    with open_text(path, f"the path of a JSON file after {scheme}:") as file:
        content = _parsed(path, file.read())
    if not isinstance(content, dict):
        held = f"{path} holds {_shown(content)}, but {scheme}: reads a JSON object"
        raise UserError(f"{held}: a list of pairs is read with json:{path}")
    return content


def field(where: str, entry: Any, key: str, kind: str = "", cure: str = "correct it") -> Any:
    """The value at a key of an entry; raises UserError if there is none of this kind in KINDS."""
    if not isinstance(entry, dict):
        raise UserError(f'{where} is {_shown(entry)}, not an object with the key "{key}"')
    if key not in entry:
        wrong = f'{where} has no key "{key}" (its keys: {keys_of(entry)})'
        raise UserError(f"{wrong}: {cure}")
    value = entry[key]
    wrong = isinstance(value, bool) or value == "" or not isinstance(value, KINDS.get(kind, object))
    if kind and wrong:
        raise UserError(f'{where}, key "{key}": {_shown(value)} is not {kind}: {cure}')
    return value


def captions_in(
    where: str, entry: Any, key: str, cure: str = "give a text, or a list of texts"
) -> tuple[str, ...]:
    """The texts with words in the text, or list of texts, at a key of an entry; raises UserError
    for anything else.
    """
    captions = field(where, entry, key, cure=cure)
    texts = [captions] if isinstance(captions, str) else captions or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        value = f'{where}, key "{key}": {_shown(captions)}'
        raise UserError(f"{value} is neither a text nor a list of texts: {cure}")
    return tuple(filter(has_words, texts))


def _shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _parsed(path: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as failure:
        raise _broken(path, failure) from failure


def _other_scheme(content: Any) -> str:
    """A hint if another scheme reads the content; else empty."""
    for keys, whose, scheme in _OTHERS:
        if isinstance(content, dict) and keys <= content.keys():
            return f"{whose} is read with {scheme}:, otherwise "
    return ""


def _broken(where: str, failure: ValueError) -> UserError:
    """The refusal of a text that is no JSON."""
    wrong = f"cannot be read ({failure})"
    if isinstance(failure, json.JSONDecodeError):
        place = f"line {failure.lineno} column {failure.colno}"
        wrong = f"is not JSON ({failure.msg.lower()}, {place})"
    return UserError(f"{where} {wrong}: fix or remove it")


def _pair(where: str, entry: Any, keys: dict[str, str]) -> Entry:
    image_key, caption_key, id_key = keys["image"], keys["caption"], keys["id"]
    cure = f"{_other_scheme(entry)}name the key of paths by adding ?image_key=NAME"
    image = field(where, entry, image_key, "the path of an image", cure)
    cure = "name the key of captions by adding ?caption_key=NAME"
    captions = captions_in(where, entry, caption_key, cure)
    key = None
    if entry.get(id_key) not in (None, ""):
        key = field(where, entry, id_key, "an id", "use a whole number or a string")
    return Entry(where, image, captions, key)


def _checked(path: str) -> tuple[int, str]:
    """(pairs checked, image root) in the check.json beside usable.jsonl; (0, "") otherwise."""
    folder, name = os.path.split(path)
    if name != USABLE:
        return 0, ""
    try:
        with open(os.path.join(folder, CHECK), encoding="utf-8") as file:
            check = parse_json(file.read())
        return int(check["listed"]), str(check.get("image_root") or "")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
