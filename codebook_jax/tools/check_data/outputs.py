"""What check-data prints and writes: numbers, a page, what is usable, what is not and why."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.data.sources.record import NO_CAPTION
from codebook_jax.files import write_json, written_whole
from codebook_jax.report.charts import histogram
from codebook_jax.report.page import FILE as PAGE
from codebook_jax.report.page import Pictures, write_page
from codebook_jax.tools.check_data.findings import Part, pictures_of
from codebook_jax.tools.check_data.inspection import Status, has_files, pieces_of

SKIPPED = "skipped.tsv"
FILES = (CHECK, USABLE, SKIPPED, PAGE)
_SAMPLES, _EXAMPLES = 48, 8  # pictures, pairs of pictures
_ERRORS = "backslashreplace"  # for lone surrogates in names and captions


def write(
    workdir: Path, parts: Sequence[Part], verdicts: Sequence[str], *, decoded: bool
) -> str | None:
    """Prints the table, writes the files, and returns `_image_root`; `parts[0]` is all training."""
    training = parts[0]
    rows = [["", *(part.label for part in parts)]]
    for name, (label, _) in training.numbers.items():
        rows.append([label, *(f"{part.numbers[name][1]:,}" for part in parts)])
    _print(rows, parts, verdicts)
    root = _image_root(training)
    _write_usable(workdir / USABLE, training, root)
    _write_skipped(workdir / SKIPPED, parts)
    content = {
        "listed": training.counts["listed"],
        "usable": training.counts["usable"],
        "image_root": root,
        "max_tokens": training.max_tokens,
        "sources": [
            {"label": part.label, "source": repr(part.source), **part.counts}
            | {"most_repeated": part.most_repeated}
            for part in parts
        ],
        "leaks": [part.leak for part in parts if part.leak],
        "verdicts": verdicts,
    }
    pictures = Pictures()
    sources = zip(content["sources"], parts, strict=True)
    sections = [source | _section(part, pictures) for source, part in sources]
    leaked = [
        {"label": part.label, "evidence": evidence} | _pairs(part, training, match, pictures)
        for part in parts
        for evidence, match in (part.matches or {}).items()
        if (match >= 0).any()
    ]
    values = {"title": "The data", "rows": rows, "verdicts": verdicts, "decoded": decoded}
    write_page(workdir / PAGE, "check.html", pictures, **values, parts=sections, leaks=leaked)
    write_json(workdir / CHECK, content)
    return root


def _print(rows: Sequence[Sequence[str]], parts: Sequence[Part], verdicts: Sequence[str]) -> None:
    table = Table("", *(Column(label, justify="right") for label in rows[0][1:]))
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for found in filter(None, (part.leak for part in parts)):
        console.print(
            f"{found['leaked']:,} of {found['images']:,} pictures of {found['evaluation']} are in "
            f"training, or look like one there ({found['same_content']:,} the same file, "
            f"{found['same_look']:,} look the same; {found['same_name_alone']:,} more have only "
            "the same name)"
        )
    for sentence in verdicts:
        console.print(f"problem: {sentence}")


def _image_root(training: Part) -> str | None:
    """The folder that holds all usable pictures; None without any, if they are not files, or for
    what are no pairs.
    """
    source, pictures = training.source, pictures_of(training.found)
    if source.kind != "pairs" or not all(map(has_files, pieces_of(source))):
        return None
    usable = pictures[training.found["status"][pictures] == Status.USABLE].tolist()
    folders = {os.path.dirname(source[record].image) for record in usable}
    return os.path.commonpath(folders) if folders else None


def _write_usable(path: Path, part: Part, root: str | None) -> None:
    """One usable record per line, for `json:`; no file if the pictures are none."""
    if root is None:
        path.unlink(missing_ok=True)  # an earlier check's
        return
    with written_whole(path, errors=_ERRORS) as file:
        for record in np.flatnonzero(part.usable).tolist():
            image, captions, image_id = part.source[record]
            entry = {"image": os.path.relpath(image, root), "caption": captions}
            file.write(json.dumps(entry | {"image_id": image_id}, ensure_ascii=False) + "\n")


def _write_skipped(path: Path, parts: Sequence[Part]) -> None:
    """source, name and reason of each unusable record, separated by tabs."""
    with written_whole(path, errors=_ERRORS) as file:
        for part in (part for part in parts if not isinstance(part.source, Mixture)):
            rows = list(part.source.left_out)
            for record in np.flatnonzero(~part.usable).tolist():
                name = part.source.name(record)
                rows.append((name, part.found["reason"][record] or f"{name} {NO_CAPTION}"))
            for row in rows:
                fields = (" ".join(field.split()) for field in (part.label, *row))
                file.write("\t".join(fields) + "\n")


def _section(part: Part, pictures: Pictures) -> dict[str, Any]:
    """What the page shows of a source, besides its entry in check.json."""
    found = part.found[pictures_of(part.found)]
    usable = found["first"][found["status"] == Status.USABLE]
    sample = np.random.default_rng(0).permutation(usable)[:_SAMPLES]  # the same one each time
    lengths = np.bincount(part.captions["tokens"], minlength=1)
    labels = {"title": "Length of the captions", "x": "tokens", "y": "captions"}
    labels["note"] = (
        f"{part.counts['truncated']:,} of {part.counts['captions']:,} are longer than the "
        f"{part.max_tokens} tokens that the model reads."
    )
    charts = [histogram(lengths, **labels, mark=part.max_tokens)]
    sides = np.sort([found[side] for side in ("height", "width")], axis=0)
    for name, side in zip(("Shorter", "Longer"), sides, strict=True):
        if side.any():
            labels = {"title": f"{name} side of a picture", "x": "pixels", "y": "pictures"}
            charts.append(histogram(np.bincount(side[side > 0]), **labels))
    return {
        "charts": charts,
        "sample": [_figure(part, record, pictures) for record in sorted(sample.tolist())],
        "copies": _pairs(part, part, part.copies, pictures),
        "twins": _pairs(part, part, part.twins, pictures),
    }


def _pairs(part: Part, other: Part, matches: np.ndarray, pictures: Pictures) -> dict[str, Any]:
    """The first pictures next to their matches, and how many there are."""
    matched = np.flatnonzero(matches >= 0)
    shown = [
        (_figure(part, record, pictures), _figure(other, int(matches[record]), pictures))
        for record in matched[:_EXAMPLES].tolist()
    ]
    return {"count": len(matched), "shown": shown}


def _figure(part: Part, record: int, pictures: Pictures) -> dict[str, Any]:
    """The picture of a record with its captions, or why it cannot be shown."""
    name, caption = part.source.name(record), " · ".join(part.source.captions(record)[:2])
    figure = {"picture": f"{part.label}/{record}", "name": name, "caption": caption}
    try:
        pictures.add(figure["picture"], decode(part.source[record].image), caption)
    except UnreadableImage as error:
        figure["failure"] = str(error)
    return figure
