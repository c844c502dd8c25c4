"""Reads JSON, raising ValueError whatever is wrong with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any


class TooLong:
    """Stands for a whole number with more digits than Python reads, so that messages can name its place."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __str__(self) -> str:
        return f"{self._digits[:8]}... ({len(self._digits):,} digits)"


def parse_json(text: str | bytes, *, of_data: bool = False) -> Any:
    """The content of a JSON text; raises ValueError with one sentence for anything that is not JSON.

    Unlike Python's own reader, it raises ValueError for a repeated key in an object, and for nesting too deep for the
    stack. With `of_data`, whole numbers that are too long become `TooLong`, so that the rest can be read.
    """
    with _one_kind_of_error():
        return (_OF_DATA if of_data else _STRICT).decode(
            text if isinstance(text, str) else _decoded(text)
        )


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """(the value that begins at `start`, where it ends), otherwise like `parse_json(of_data=True)`."""
    with _one_kind_of_error():
        return _OF_DATA.raw_decode(text, start)


@contextlib.contextmanager
def _one_kind_of_error() -> Iterator[None]:
    try:
        yield
    except RecursionError as failure:
        raise ValueError("lists or objects are nested too deeply") from failure


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


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_OF_DATA = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)
