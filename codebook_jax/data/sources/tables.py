"""Pairs in a table, CSV or TSV: one pair per row, the columns named by the first row or numbered
from 0.

CSV columns may also be separated by semicolons or tabs, whichever fits the first row. Rows with the
same path or id are the same image. With `?quotes=none` quotes have no meaning.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence

from codebook_jax.data.sources.listed import Entry, Listed, keys_of, open_text
from codebook_jax.data.sources.record import Request
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

SEPARATORS = {"csv": ",;\t", "tsv": "\t"}  # allowed in each form, the usual one first
_CALLED = {",": "commas", ";": "semicolons", "\t": "tabs"}
USUAL = {  # names of columns, first match wins; not "id", which often numbers rows, not images
    "image": (
        *("image", "image_path", "image_name", "filepath", "file_path", "filename", "file_name"),
        *("file", "path", "url"),
    ),
    "caption": ("caption", "text", "title", "captions"),
    "id": ("image_id",),
}
Row = tuple[int, list[str]]  # number of its first line, cells


def open_table(request: Request) -> Listed:
    """`csv:PATH` and `tsv:PATH`."""
    return Listed(request, _entries(request))


def _entries(request: Request) -> Iterator[Entry]:
    """The rows of the file, split at the first separator that gives the columns."""
    path, failures = request.place, []
    for separator in SEPARATORS[request.scheme]:
        rows = _rows(request, separator)
        first = next(rows, None)
        if first is None:
            raise UserError(f"{path} is empty: give a table with one pair per row")
        try:
            places, headed = _columns(request, first[1])
        except UserError as failure:
            failures.append(failure)
            continue
        for line, row in rows if headed else itertools.chain([first], rows):
            yield _entry(f"{path} line {line}", row, len(first[1]), places)
        return
    raise failures[0]


def _columns(request: Request, first: Sequence[str]) -> tuple[dict[str, int | None], bool]:
    """({part of a pair: column}, whether the first row names the columns): as the options name or
    number them, else those with usual names in the first row.
    """
    names = [name.strip().lower() for name in first]
    places: dict[str, int | None] = {}
    headed, unusual = False, False
    for part, usual in USUAL.items():
        key = request.keys[part]
        numbered = bool(key) and key.isdecimal() and key not in first
        if numbered:
            found = int(key) if int(key) < len(first) else None
        elif key is not None:
            found = list(first).index(key) if key in first else None
        else:
            found = next((names.index(name) for name in usual if name in names), None)
        if found is None and (key is not None or part != "id"):
            raise _no_column(request, part, key, first)
        headed |= found is not None and not numbered
        unusual |= numbered and names[found] not in usual
        places[part] = found
    return places, headed or not unusual


def _rows(request: Request, separator: str) -> Iterator[Row]:
    """The rows that are not blank."""
    path = request.place
    plain = request.choice("quotes", ("csv", "none")) == "none"
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    usual = _CALLED[SEPARATORS[request.scheme][0]]
    wanted = f"the path of a table with {usual} between its columns after {request.scheme}:"
    with open_text(path, wanted, newline="") as file:
        # Strict: otherwise a stray quote would swallow the rows up to the next one.
        reader, line = csv.reader(file, delimiter=separator, quoting=quoting, strict=True), 1
        try:
            for row in reader:
                if any(cell and not cell.isspace() for cell in row):
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as failure:
            raise UserError(
                f"{path} line {line} is not a valid row ({failure}): quote fields that contain "
                "quotes, doubling those inside, or add ?quotes=none if quotes have no meaning"
            ) from failure


def _entry(where: str, row: Sequence[str], cells: int, places: dict[str, int | None]) -> Entry:
    if len(row) != cells:
        count = f"{len(row)} cell{'s' * (len(row) != 1)}"
        cure = "complete the row, or quote the fields that contain a separator"
        raise UserError(f"{where} has {count}, the first row {cells}: {cure}")
    image, caption = row[places["image"]].strip(), row[places["caption"]]
    if not image:
        raise UserError(f"{where} has no image: give its path, or remove the row")
    key = row[places["id"]].strip() if places["id"] is not None else ""
    return Entry(where, image, (caption,) if has_words(caption) else (), key or None)


def _no_column(request: Request, part: str, key: str | None, first: Sequence[str]) -> UserError:
    """The refusal of a table without a column for a part of a pair."""
    path, form = request.place, request.scheme
    others = (other for other in SEPARATORS["csv"] if other not in SEPARATORS[form])
    other = next((other for other in others if other in first[0]), None)
    if len(first) == 1 and other:
        held = f"{path} has columns separated by {_CALLED[other]}"
        return UserError(f"{held}: read it with csv:{path}")
    wanted = f"column {key!r} for ?{part}_key"
    if key is None:
        wanted = f"column with a usual name for {part}s ({', '.join(USUAL[part])})"
    return UserError(
        f"{path} has no {wanted} (its first row: {keys_of([name[:40] for name in first])}): name "
        f"one of these with ?{part}_key=NAME or, if the first row is already a pair, number the "
        "columns from 0: ?image_key=0&caption_key=1"
    )
