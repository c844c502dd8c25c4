"""Pairs in a table, CSV or TSV: one pair per row, the columns named by the first row or numbered
from 0. CSV columns may also be separated by semicolons or tabs, whichever fits the first row.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator

from codebook_jax.data.sources.listed import Entry, Listed, open_text, pair_in
from codebook_jax.data.sources.record import PARTS, Request
from codebook_jax.data.sources.rows import Parts, parts_of
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
_HINT = (
    " or, if the first row is already a pair, number the columns from 0: "
    "?image_key=0&caption_key=1; and read commas or semicolons with csv:"
)


def open_table(request: Request) -> Listed:
    """`csv:PATH` and `tsv:PATH`."""
    return Listed(request, _entries(request))


def _entries(request: Request) -> Iterator[Entry]:
    """The rows of the file, split at the first separator that its first row has."""
    path = request.place
    for separator in SEPARATORS[request.scheme]:
        rows = _rows(request, separator)
        start, first = next(rows, (1, []))
        if len(first) > 1:
            break
    width = len(first)
    names = [*first, *map(str, range(width))]  # a number names a column too
    parts = zip(PARTS, parts_of(path, request, names, USUAL, _HINT), strict=True)
    places = {part: names.index(name) for part, name in parts if name is not None}
    is_header = any(place < width for place in places.values()) or all(
        first[place - width].strip().lower() in USUAL[part] for part, place in places.items()
    )
    for line, row in rows if is_header else itertools.chain([(start, first)], rows):
        where = f"{path} line {line}"
        if len(row) != width:
            raise UserError(
                f"{where} has {len(row)} cells, the first row {width}: complete the row, or quote "
                "the fields that contain a separator"
            )
        cells = {part: row[place % width] for part, place in places.items()}
        stripped = {part: cell.strip() for part, cell in cells.items() if part != "caption"}
        yield pair_in(where, cells | stripped, Parts(*PARTS))


def _rows(request: Request, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    path = request.place
    plain = request.choice("quotes", ("csv", "none")) == "none"
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    with open_text(path, newline="") as file:
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
