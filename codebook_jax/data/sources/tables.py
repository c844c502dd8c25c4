"""Pairs in a table, CSV or TSV: one pair per row, the columns named by the first row or numbered
from 0.

CSV columns may also be separated by semicolons or tabs, whichever fits the first row. Rows with the
same path or id are the same image. Fields may be quoted; with `?quotes=none` quotes have no
meaning.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from codebook_jax.data.sources.listed import Entry, Listed, folders_of, keys_of, reading
from codebook_jax.data.text import has_words
from codebook_jax.errors import UserError

if TYPE_CHECKING:
    from codebook_jax.data.sources.opening import Request

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


class Columns(NamedTuple):
    """The positions of the parts of a pair in a row."""

    image: int
    caption: int
    id: int | None
    count: int  # cells in every row
    headed: bool  # whether the first row names them


def open_csv(request: Request) -> Listed:
    """`csv:PATH`: see the module."""
    return _open(request, "csv")


def open_tsv(request: Request) -> Listed:
    """`tsv:PATH`: see the module."""
    return _open(request, "tsv")


def table_entries(path: str, form: str, options: Mapping[str, str]) -> Iterator[Entry]:
    """The entries of a file; raises UserError, naming the line, if a row is not a pair."""
    rows, first, columns = _begun(path, form, options)
    if not columns.headed:
        yield _entry(path, *first, columns)
    for line, row in rows:
        yield _entry(path, line, row, columns)


def _begun(
    path: str, form: str, options: Mapping[str, str]
) -> tuple[Iterator[tuple[int, list[str]]], tuple[int, list[str]], Columns]:
    """(the rows after the first, the first, the columns) with the first separator that gives the
    columns.
    """
    plain, failures = _plain(path, form, options), []
    for separator in SEPARATORS[form]:
        rows = _rows(path, form, separator, plain=plain)
        try:
            first = next(rows, None)
            if first is None:
                raise UserError(f"{path} is empty: give a table with one pair per row")
            return rows, first, columns_of(path, form, first[1], options)
        except UserError as failure:
            failures.append(failure)
    raise failures[0]


def columns_of(path: str, form: str, first: Sequence[str], options: Mapping[str, str]) -> Columns:
    """The columns that the options name or number, else those with usual names in the first row.

    Raises UserError if a column cannot be found.
    """
    names = [name.strip().lower() for name in first]
    given = {part: options.get(f"{part}_key") for part in USUAL}
    numbered = {
        part: int(key)
        for part, key in given.items()
        if key and key.isdecimal() and key not in first
    }
    places: dict[str, int | None] = {}
    for part, usual in USUAL.items():
        key = given[part]
        if part in numbered:
            places[part] = numbered[part] if numbered[part] < len(first) else None
        elif key is not None:
            places[part] = list(first).index(key) if key in first else None
        else:
            places[part] = next((names.index(name) for name in usual if name in names), None)
        if places[part] is None and (key is not None or part != "id"):
            raise UserError(_no_column(path, form, part, key, first))
    headed = len(numbered) < sum(places[part] is not None for part in USUAL) or all(
        names[at] in USUAL[part] for part, at in numbered.items()
    )
    return Columns(places["image"], places["caption"], places["id"], len(first), headed)


def _open(request: Request, form: str) -> Listed:
    folders = folders_of(request.place, request.image_root, request.settings.path_map)
    entries = table_entries(request.place, form, request.options)
    return Listed(form, request.place, entries, folders, merge=request.merge)


def _plain(path: str, form: str, options: Mapping[str, str]) -> bool:
    """Whether quotes have no meaning."""
    quotes = options.get("quotes", "csv")
    if quotes not in ("csv", "none"):
        raise UserError(
            f"{form}:{path}: quotes={quotes} is not valid: use quotes=csv or quotes=none"
        )
    return quotes == "none"


def _rows(path: str, form: str, separator: str, *, plain: bool) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row that is not blank."""
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    wanted = (
        f"the path of a table with {_CALLED[SEPARATORS[form][0]]} between its columns after {form}:"
    )
    with reading(path, wanted), open(path, encoding="utf-8-sig", newline="") as file:
        # Strict: otherwise a stray quote would swallow the rows up to the next one.
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as failure:
                raise UserError(
                    f"{path} line {line} is not a valid row ({failure}): quote fields that contain "
                    "quotes, doubling those inside, or add ?quotes=none if quotes have no meaning"
                ) from failure
            if row is None:
                return
            if any(cell and not cell.isspace() for cell in row):
                yield line, row


def _entry(path: str, line: int, row: Sequence[str], columns: Columns) -> Entry:
    where = f"{path} line {line}"
    if len(row) != columns.count:
        more = len(row) > columns.count
        cure = "quote the fields that contain one" if more else "complete the row"
        raise UserError(
            f"{where} has {len(row)} cell{'s' * (len(row) != 1)}, the first row {columns.count}: "
            f"{'it has extra separators' if more else 'cells are missing'}, {cure}"
        )
    image, caption = row[columns.image].strip(), row[columns.caption]
    if not image:
        raise UserError(f"{where} has no image: give its path, or remove the row")
    key = row[columns.id].strip() if columns.id is not None else ""
    return Entry(where, image, (caption,) if has_words(caption) else (), key or None)


def _no_column(path: str, form: str, part: str, key: str | None, first: Sequence[str]) -> str:
    others = (other for other in SEPARATORS["csv"] if other not in SEPARATORS[form])
    found = next((other for other in others if other in first[0]), None)
    if len(first) == 1 and found:
        return f"{path} has columns separated by {_CALLED[found]}: read it with csv:{path}"
    shown = keys_of([name[:40] for name in first])
    if key is not None:
        return f"{path} has no column {key!r} for ?{part}_key (its first row: {shown}): use one of these, or a number from 0"
    usual = ", ".join(USUAL[part])
    return (
        f"{path} has no column with a usual name for {part}s ({usual}) in its first row ({shown}): "
        f"name it with ?{part}_key=NAME, or, if the first row is already a pair, number the "
        "columns: ?image_key=0&caption_key=1"
    )
