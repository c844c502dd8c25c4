"""The files that a check of the data leaves: its numbers, the usable pairs, and what is not usable and why."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from codebook_jax.check_data.findings import Part
from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.errors import UserError
from codebook_jax.workdir import RECORD

SKIPPED, PAGE = "skipped.tsv", "report.html"


def check_folder(workdir: Path) -> None:
    """Raises UserError where the folder holds something else than an earlier check."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file: give a folder for the report")
    names = os.listdir(workdir) if workdir.exists() else []
    if RECORD in names:
        raise UserError(
            f"--workdir={workdir} holds a training run ({RECORD}): give another folder for the report"
        )
    foreign = sorted({*names} - {CHECK, USABLE, SKIPPED, PAGE})
    foreign = [name for name in foreign if not name.startswith(".")]
    if foreign:
        raise UserError(
            f"--workdir={workdir} holds other files ({foreign[0]}, ...): give an empty folder for the report"
        )


def image_root(parts: list[Part]) -> str | None:
    """The folder that all pictures of these sources are below; None where they are no files."""
    folders = set()
    for part in parts:
        for record in part.images.first.tolist():
            image = _file_of(part.source, record)
            if image is None:
                return None
            folders.add(os.path.dirname(image))
    return os.path.commonpath(folders)


def _file_of(source: Source, record: int) -> str | None:
    """The path of a record's picture; None where it is no file of its own."""
    try:
        image = source[record].image
    except UnreadableImage:
        return None
    return image if isinstance(image, str) else None


def write_usable(path: Path, parts: list[Part], root: str | None) -> None:
    """One usable record a line: as `json:` reads it where pictures are files, else its place in the source."""
    first_id = 0
    with written_whole(path) as file:
        for part in parts:
            for record in np.flatnonzero(part.usable_records).tolist():
                file.write(json.dumps(_entry(part, record, root, first_id), ensure_ascii=False) + "\n")
            first_id += part.source.listed


def write_skipped(path: Path, parts: list[Part]) -> None:
    """source, name, reason of each record that is not usable, with tabs between."""
    with written_whole(path) as file:
        for part in parts:
            rows = list(part.source.left_out)
            for record in np.flatnonzero(~part.usable_records).tolist():
                reason = part.images.reasons[int(part.images.which[record])]
                rows.append((part.source.name(record), reason))
            for name, reason in rows:
                fields = (part.label, name, reason)
                file.write("\t".join(" ".join(field.split()) for field in fields) + "\n")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name once it is written to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _entry(part: Part, record: int, root: str | None, first_id: int) -> dict[str, Any]:
    captions = list(part.source.captions(record))
    if root is None:
        name = part.source.name(record)
        return {"source": repr(part.source), "index": record, "name": name, "caption": captions}
    read = part.source[record]
    image = os.path.relpath(read.image, root)
    return {"image": image, "caption": captions, "image_id": first_id + read.image_id}
