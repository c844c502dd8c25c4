"""Pairs in ALBEF's JSON format, a list or one object per line: {"image": path below the image root,
"caption": text or list of texts, "image_id": optional int or text}. The keys may have other names.
If the first entry has "frames" instead of an image, all are stories: see `story_lists`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codebook_jax.data.sources.listed import Listed, open_text, pair_in
from codebook_jax.data.sources.record import Request, Source
from codebook_jax.data.sources.rows import Parts
from codebook_jax.data.sources.story_lists import FRAMES, ListedStories
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json, parse_json_at

USABLE, CHECK = "usable.jsonl", "check.json"  # files that check-data writes
_CONVERT = (
    "import json, pickle; json.dump(pickle.load(open({path!r}, 'rb')), open('converted.json', 'w'))"
)
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")  # a missing or a last comma does no harm


def open_json(request: Request) -> Source:
    """`json:PATH`; for usable.jsonl, the image root is the one that check-data recorded."""
    usual = Parts("image", "caption", "image_id")._asdict()
    parts = Parts(**{part: key or usual[part] for part, key in request.keys.items()})
    entries = read_json(request.place)
    first = list(itertools.islice(entries, 1))
    entries = itertools.chain(first, entries)
    if any(isinstance(it, dict) and FRAMES in it and parts.image not in it for _, it in first):
        return ListedStories(request, entries)
    listed, image_root = _checked(request.place)
    if image_root:  # one in the options still wins
        request = request._replace(settings=request.settings._replace(image_root=image_root))
    pairs = (pair_in(where, entry, parts) for where, entry in entries)
    source = Listed(request, pairs)
    source.listed = max(listed, source.listed)
    return source


def _checked(path: str) -> tuple[int, str]:
    """(pairs checked, image root) in the check.json beside usable.jsonl; (0, "") otherwise."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if os.path.basename(path) == USABLE:
            check = parse_json(Path(path).with_name(CHECK).read_bytes())
            return int(check["listed"]), str(check.get("image_root") or "")
    return 0, ""


def read_json(path: str, key: str = "") -> Iterator[tuple[str, Any]]:
    """("file[3]", entry) of a JSON list, or ("file line 3", entry) of one entry after the other;
    with a key, ("file key[3]", entry) of the list at this key of an object. Raises UserError where
    it is no JSON, and without such a list.

    Entries are parsed one at a time: parsed at once, they take many times the memory of the text.
    """
    refuse_pickle(path)
    with open_text(path) as file:
        text = file.read()
    begins = re.search(rf'"{key}"\s*:\s*(?=\[)', text) if key else _SPACE.match(text)
    if begins is None:
        raise UserError(f'{path} has no list at a key "{key}": give the file that has it')
    first, path = begins.end(), f"{path} {key}" if key else path
    in_list = text.startswith("[", first)
    last, place = "]" if in_list else "", _SPACE.match(text, first + in_list).end()
    number, line, where = 0, 1 + text.count("\n", 0, place), path
    try:
        while text[place : place + 1] != last:
            where = f"{path}[{number}]" if in_list else f"{path} line {line}"
            entry, end = parse_json_at(text, place)
            yield where, entry
            end = _BETWEEN.match(text, end).end()
            number, line, place = number + 1, line + text.count("\n", place, end), end
        end = _SPACE.match(text, place + in_list).end()
        if not key and end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except ValueError as failure:
        raise UserError(f"{where} cannot be read as JSON ({failure}): correct it") from failure


def refuse_pickle(path: str, what: str = "", program: str = "") -> None:
    """Raises UserError for a pickle, with the Python `program` that converts `what` is in it."""
    if os.path.isfile(path):  # a pipe can be read only once
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(1) != b"\x80" and not path.endswith((".p", ".pkl", ".pickle")):
                return
            raise UserError(
                f"{path} is a pickle, which can run any program when it is opened: if you trust "
                f"the file, convert it once{what}: python -c "
                f'"{program or _CONVERT.format(path=path)}"'
            )


def read_object(path: str) -> Any:
    """The only entry of a JSON file, or the list of all if there are several."""
    entries = [entry for _, entry in read_json(path)]
    return entries[0] if len(entries) == 1 else entries
