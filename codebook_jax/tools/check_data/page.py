"""The report as one self-contained HTML page: tables, histograms, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.report.charts import histogram
from codebook_jax.report.page import Pictures, write_page
from codebook_jax.tools.check_data.findings import Leak, Part

_SAMPLES, _EXAMPLES = 48, 8


def write(
    path: Path,
    rows: Sequence[Sequence[str]],
    parts: Sequence[Part],
    leaks: Sequence[Leak],
    verdicts: Sequence[str],
    max_tokens: int,
) -> None:
    """Writes the whole page; `rows` are those of the printed table, header first."""
    pictures = Pictures()
    write_page(
        path,
        "check.html",
        title="The data",
        rows=rows,
        verdicts=verdicts,
        parts=[_about(part, max_tokens, pictures) for part in parts],
        leaks=[found for one in leaks for found in _leaked(one, pictures) if found["shown"]],
        pictures=pictures,
    )


def _about(part: Part, max_tokens: int, pictures: Pictures) -> dict[str, Any]:
    """The section on one source."""
    cut = part.captions.truncated(max_tokens)
    charts = [
        histogram(
            part.captions.lengths,
            title="Length of the captions",
            x="tokens",
            y="captions",
            note=f"{cut:,} of {part.captions.count:,} are longer than the {max_tokens} tokens "
            "that the model reads.",
            mark=max_tokens,
        )
    ]
    sides = part.images.sides[part.images.sides[:, 0] > 0]
    if len(sides):
        for name, side in (("Shorter", sides.min(axis=1)), ("Longer", sides.max(axis=1))):
            charts.append(
                histogram(
                    np.bincount(side), title=f"{name} side of a picture", x="pixels", y="pictures"
                )
            )
    usable = np.flatnonzero(part.images.usable)
    chosen = sorted(
        np.random.default_rng(0).permutation(usable)[:_SAMPLES].tolist()
    )  # the same sample each time
    repeated = [(one.caption, f"{one.images:,}") for one in part.captions.most_repeated]
    return {
        "label": part.label,
        "source": repr(part.source),
        "charts": charts,
        "sample": [_figure(part, at, pictures) for at in chosen],
        "pairs": [
            _pairs("Copies of another picture", part, part, part.copies, pictures),
            _pairs("Pictures that look like another", part, part, part.twins, pictures),
        ],
        "repeated": [("caption", "pictures"), *repeated],
    }


def _leaked(one: Leak, pictures: Pictures) -> list[dict[str, Any]]:
    kinds = (
        (one.content, "The same file" if one.decoded else "The same path"),
        (np.where(one.content < 0, one.look, -1), "The same look"),
        (np.where(one.name_alone, one.name, -1), "Only the same name"),
    )
    return [
        _pairs(
            f"{what}: {one.evaluation.label} and training",
            one.evaluation,
            one.training,
            found,
            pictures,
        )
        for found, what in kinds
    ]


def _pairs(
    title: str, part: Part, other: Part, found: np.ndarray, pictures: Pictures
) -> dict[str, Any]:
    """Pictures next to their matches."""
    matched = np.flatnonzero(found >= 0)
    shown = [
        (_figure(part, at, pictures), _figure(other, int(found[at]), pictures))
        for at in matched[:_EXAMPLES].tolist()
    ]
    return {"title": title, "count": len(matched), "shown": shown}


def _figure(part: Part, image: int, pictures: Pictures) -> dict[str, Any]:
    """A picture of a source with its captions, or why it cannot be shown."""
    record = int(part.images.first[image])
    caption = " · ".join(part.source.captions(record)[:2])
    name = f"{part.label}/{image}"
    failure = None
    try:
        if not pictures.knows(name):
            pictures.add(name, decode(part.source[record].image), caption)
    except UnreadableImage as error:
        failure = str(error)
    return {
        "picture": name,
        "name": part.source.name(record),
        "caption": caption,
        "failure": failure,
    }
