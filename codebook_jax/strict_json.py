"""JSON read with one kind of error, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


class TooLong:
    """Stands for a whole number with more digits than Python reads, so that its place can be named."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __str__(self) -> str:
        return f"{self._digits[:8]}... ({len(self._digits):,} digits)"


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text; raises ValueError with one sentence for anything that is not JSON.

    Departures from Python's own reader: a key that an object has twice is an error, and so is nesting that is too deep
    for the stack; whole numbers that are too long become `TooLong`.
    """
    try:
        return DECODER.decode(text if isinstance(text, str) else _decoded(text))
    except RecursionError as failure:
        raise ValueError(TOO_DEEP) from failure


def _decoded(text: bytes) -> str:
    return text.decode(json.detect_encoding(text), "surrogatepass").removeprefix("\ufeff")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"an object has the key {twice!r} twice")
    return content


def _whole_number(digits: str) -> int | TooLong:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        return TooLong(digits)


TOO_DEEP = "lists or objects are nested too deeply"
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)
