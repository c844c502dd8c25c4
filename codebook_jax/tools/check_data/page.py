"""The findings as one self-contained HTML page: tables, histograms, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.report import page
from codebook_jax.report.charts import histogram
from codebook_jax.tools.check_data.findings import Leak, Part

_SAMPLES, _EXAMPLES = 48, 8


def write_page(
    path: Path,
    rows: Sequence[Sequence[str]],
    parts: Sequence[Part],
    leaks: Sequence[Leak],
    verdicts: Sequence[str],
) -> None:
    """Writes the page; `rows` are those of the printed table, header first."""
    pictures = page.Pictures()
    page.write_page(
        path,
        "check.html",
        pictures,
        title="The data",
        rows=rows,
        verdicts=verdicts,
        parts=[_about(part, pictures) for part in parts],
        leaks=[found for leak in leaks for found in _leaked(leak, pictures) if found["shown"]],
    )


def _about(part: Part, pictures: page.Pictures) -> dict[str, Any]:
    """The section on one source."""
    usable = np.flatnonzero(part.images.usable)
    sample = np.random.default_rng(0).permutation(usable)[:_SAMPLES]  # the same one each time
    return {
        "label": part.label,
        "source": repr(part.source),
        "charts": _charts(part),
        "sample": [_figure(part, image, pictures) for image in sorted(sample.tolist())],
        "pairs": [
            _pairs("Copies of another picture", part, part, part.copies, pictures),
            _pairs("Pictures that look like another", part, part, part.twins, pictures),
        ],
        "repeated": [("caption", "pictures")]
        + [(one["caption"], f"{one['images']:,}") for one in part.most_repeated],
    }


def _charts(part: Part) -> list[dict[str, Any]]:
    counts, limit = part.counts(), part.max_tokens
    note = (
        f"{counts['truncated']:,} of {counts['captions']:,} are longer than the {limit} tokens "
        "that the model reads."
    )
    titles = {"title": "Length of the captions", "x": "tokens", "y": "captions"}
    lengths = np.bincount(part.captions["tokens"], minlength=1)
    charts = [histogram(lengths, **titles, note=note, mark=limit)]
    found = part.images.found
    sides = np.stack([found["height"], found["width"]])[:, found["height"] > 0]
    if sides.size:
        for name, side in (("Shorter", sides.min(axis=0)), ("Longer", sides.max(axis=0))):
            title = f"{name} side of a picture"
            charts.append(histogram(np.bincount(side), title=title, x="pixels", y="pictures"))
    return charts


def _leaked(leak: Leak, pictures: page.Pictures) -> list[dict[str, Any]]:
    titles = {
        "content": "The same file" if leak.decoded else "The same path",
        "look": "The same look",
        "name": "Only the same name",
    }
    parts = leak.evaluation, leak.training
    return [
        _pairs(
            f"{title}: {leak.evaluation.label} and training",
            *parts,
            np.where(leak.shown_by(evidence), leak.match, -1),
            pictures,
        )
        for evidence, title in titles.items()
    ]


def _pairs(
    title: str, part: Part, other: Part, matches: np.ndarray, pictures: page.Pictures
) -> dict[str, Any]:
    """Pictures next to their matches."""
    matched = np.flatnonzero(matches >= 0)
    shown = [
        (_figure(part, image, pictures), _figure(other, int(matches[image]), pictures))
        for image in matched[:_EXAMPLES].tolist()
    ]
    return {"title": title, "count": len(matched), "shown": shown}


def _figure(part: Part, image: int, pictures: page.Pictures) -> dict[str, Any]:
    """A picture of a source with its captions, or why it cannot be shown."""
    record = int(part.images.first[image])
    caption = " · ".join(part.source.captions(record)[:2])
    figure = {"picture": f"{part.label}/{image}", "name": part.name(image), "caption": caption}
    try:
        pictures.add(figure["picture"], decode(part.source[record].image), caption)
    except UnreadableImage as error:
        return figure | {"failure": str(error)}
    return figure | {"failure": None}
