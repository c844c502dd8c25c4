"""What check-data prints and writes: the numbers, the usable pairs, what is unusable and why."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.data.sources.listed import NO_CAPTION
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.files import write_json, written_whole
from codebook_jax.report.page import FILE as PAGE
from codebook_jax.tools.check_data.findings import COUNTS, Leak, Part
from codebook_jax.tools.check_data.inspection import has_files, pieces_of
from codebook_jax.tools.check_data.page import write_page

SKIPPED = "skipped.tsv"
FILES = (CHECK, USABLE, SKIPPED, PAGE)
_ERRORS = "backslashreplace"  # for lone surrogates in names and captions


class Check(NamedTuple):
    """Everything that was found; of a mixture first the whole, then each source."""

    training: list[Part]
    others: list[Part]  # validation and test
    leaks: list[Leak]
    verdicts: list[str]  # a sentence on each share above the limit


def write(workdir: Path, check: Check) -> str | None:
    """Prints the table and writes the files; returns the folder that holds the pictures, None if
    they are not files.
    """
    parts = [*check.training, *check.others]
    counts = [part.counts() for part in parts]
    rows = [["", *(part.label for part in parts)]]
    rows += [[label, *(f"{c[name]:,}" for c in counts)] for name, (label, _) in COUNTS.items()]
    _print(rows, check)
    root = _image_root(check.training[0])
    _write_usable(workdir / USABLE, check.training[0], root)
    single = [part for part in parts if not isinstance(part.source, Mixture)]
    _write_skipped(workdir / SKIPPED, single)
    write_page(workdir / PAGE, rows, parts, check.leaks, check.verdicts)
    write_json(
        workdir / CHECK,
        {
            "listed": counts[0]["listed"],
            "usable": counts[0]["usable"],
            "image_root": root,
            "max_tokens": parts[0].max_tokens,
            "sources": [
                {"label": part.label, "source": repr(part.source), **count}
                | {"most_repeated": part.most_repeated}
                for part, count in zip(parts, counts, strict=True)
            ],
            "leaks": [leak.counts() | {"pictures": leak.pictures()} for leak in check.leaks],
            "verdicts": check.verdicts,
        },
    )
    return root


def _print(rows: Sequence[Sequence[str]], check: Check) -> None:
    table = Table()
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for count in (leak.counts() for leak in check.leaks):
        console.print(
            f"{count['leaked']:,} of {count['images']:,} pictures of {count['evaluation']} are in "
            f"training, or look like one there ({count['same_content']:,} the same file, "
            f"{count['same_look']:,} look the same; {count['same_name_alone']:,} more have only "
            "the same name)"
        )
    for sentence in check.verdicts:
        console.print(f"problem: {sentence}")


def _image_root(training: Part) -> str | None:
    """The folder that holds all usable pictures; None if there are none, or they are not separate
    files.
    """
    source, images = training.source, training.images
    if not all(map(has_files, pieces_of(source))):
        return None
    usable = images.first[images.usable].tolist()
    folders = {os.path.dirname(source[record].image) for record in usable}
    return os.path.commonpath(folders) if folders else None


def _write_usable(path: Path, part: Part, root: str | None) -> None:
    """One usable record per line: for `json:` if pictures are files, else its position."""
    source = part.source
    with written_whole(path, errors=_ERRORS) as file:
        for record in np.flatnonzero(part.usable_records).tolist():
            if root is not None:
                image, captions, image_id = source[record]
                entry = {"image": os.path.relpath(image, root), "caption": captions}
                entry["image_id"] = image_id
            else:
                which, index = source.place(record) if isinstance(source, Mixture) else (0, record)
                entry = {"source": repr(pieces_of(source)[which]), "index": index}
                entry |= {"name": source.name(record), "caption": source.captions(record)}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_skipped(path: Path, parts: Sequence[Part]) -> None:
    """source, name and reason of each unusable record, separated by tabs."""
    with written_whole(path, errors=_ERRORS) as file:
        for part in parts:
            rows = list(part.source.left_out)
            for record in np.flatnonzero(~part.usable_records).tolist():
                name = part.source.name(record)
                reason = part.images.reasons.get(int(part.images.which[record]))
                rows.append((name, reason or f"{name} {NO_CAPTION}"))
            for row in rows:
                fields = (" ".join(field.split()) for field in (part.label, *row))
                file.write("\t".join(fields) + "\n")
