"""Pairs in a table, CSV or TSV: one pair per row, the columns named by the first row or numbered
from 0. CSV columns may also be separated by semicolons or tabs, whichever fits the first row.
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
USUAL = {  # names of columns, first match wins; not "id", which often numbers rows, not images
    "image": (
        *("image", "image_path", "image_name", "filepath", "file_path", "filename", "file_name"),
        *("file", "path", "url"),
    ),
    "caption": ("caption", "text", "title", "captions"),
    "id": ("image_id",),
}


def open_table(request: Request) -> Listed:
    """`csv:PATH` and `tsv:PATH`."""
    return Listed(request, _entries(request))


def _entries(request: Request) -> Iterator[Entry]:
    """The rows of the file, split at the first separator that its first row has."""
    path = request.place
    for separator in SEPARATORS[request.scheme]:
        rows = _rows(request, separator)
        start, first = next(rows, (0, []))
        if not first:
            raise UserError(f"{path} is empty: give a table with one pair per row")
        if len(first) > 1:
            break
    columns, headed = _columns(request, first)
    for line, row in rows if headed else itertools.chain([(start, first)], rows):
        where = f"{path} line {line}"
        if len(row) != len(first):
            count = f"{len(row)} cell{'s' * (len(row) != 1)}, the first row {len(first)}"
            cure = "complete the row, or quote the fields that contain a separator"
            raise UserError(f"{where} has {count}: {cure}")
        image, caption = row[columns["image"]].strip(), row[columns["caption"]]
        if not image:
            raise UserError(f"{where} has no image: give its path, or remove the row")
        key = row[columns["id"]].strip() if columns["id"] is not None else ""
        yield Entry(where, image, (caption,) if has_words(caption) else (), key or None)


def _columns(request: Request, first: Sequence[str]) -> tuple[dict[str, int | None], bool]:
    """({part of a pair: column}, whether the first row names the columns): as the options name or
    number them, else those with usual names in the first row.
    """
    names = [name.strip().lower() for name in first]
    columns: dict[str, int | None] = {}
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
            wanted = f"column {key!r} for ?{part}_key"
            if key is None:
                wanted = f"column with a usual name for {part}s ({', '.join(usual)})"
            raise UserError(
                f"{request.place} has no {wanted} (its first row: "
                f"{keys_of([name[:40] for name in first])}): name one of these with "
                f"?{part}_key=NAME or, if the first row is already a pair, number the columns from "
                "0: ?image_key=0&caption_key=1; and read commas or semicolons with csv:"
            )
        headed |= found is not None and not numbered
        unusual |= numbered and names[found] not in usual
        columns[part] = found
    return columns, headed or not unusual


def _rows(request: Request, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    path = request.place
    plain = request.choice("quotes", ("csv", "none")) == "none"
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    with open_text(path, f"the path of a table after {request.scheme}:", newline="") as file:
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
