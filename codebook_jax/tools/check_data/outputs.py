"""The files that check-data writes: its numbers, the usable pairs, and what is unusable and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebook_jax.data.sources.json_files import CHECK, USABLE
from codebook_jax.data.sources.listed import NO_CAPTION
from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.files import written_whole
from codebook_jax.tools.check_data.findings import Part
from codebook_jax.tools.check_data.inspection import is_of_files

SKIPPED, PAGE = "skipped.tsv", "report.html"
ERRORS = "backslashreplace"  # for lone surrogates in names and captions


def is_own(name: str) -> bool:
    """Whether check-data writes a file of this name."""
    return name in (CHECK, USABLE, SKIPPED, PAGE)


def image_root(training: Part) -> str | None:
    """The folder that holds all usable pictures; None if there are none, or they are not separate
    files.
    """
    source = training.source
    pieces = source.sources if isinstance(source, Mixture) else [source]
    if not all(map(is_of_files, pieces)):
        return None
    images = training.images
    folders = {
        os.path.dirname(source[record].image) for record in images.first[images.usable].tolist()
    }
    return os.path.commonpath(folders) if folders else None


def write_usable(path: Path, parts: Sequence[Part], root: str | None) -> None:
    """One usable record per line: for `json:` if pictures are files, else its position in the
    source.

    `parts` are the sources of a mixture, or the one source; images of different sources are never
    the same image.
    """
    first_id = 0
    with written_whole(path, errors=ERRORS) as file:
        for part in parts:
            for record in np.flatnonzero(part.usable_records).tolist():
                entry = (
                    _place(part, record) if root is None else _pair(part, record, root, first_id)
                )
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            first_id += part.source.listed


def write_skipped(path: Path, parts: Sequence[Part]) -> None:
    """source, name and reason of each unusable record, separated by tabs."""
    with written_whole(path, errors=ERRORS) as file:
        for part in parts:
            for name, reason in (*part.source.left_out, *_unusable(part)):
                fields = (part.label, name, reason)
                file.write("\t".join(" ".join(field.split()) for field in fields) + "\n")


def _unusable(part: Part) -> Iterator[tuple[str, str]]:
    for record in np.flatnonzero(~part.usable_records).tolist():
        image = int(part.images.which[record])
        name = part.source.name(record)
        yield name, part.images.reasons.get(image) or f"{name} {NO_CAPTION}"


def _pair(part: Part, record: int, root: str, first_id: int) -> dict[str, Any]:
    image, captions, image_id = part.source[record]
    path = os.path.relpath(image, root)
    return {"image": path, "caption": list(captions), "image_id": first_id + image_id}


def _place(part: Part, record: int) -> dict[str, Any]:
    captions, name = list(part.source.captions(record)), part.source.name(record)
    return {"source": repr(part.source), "index": record, "name": name, "caption": captions}
