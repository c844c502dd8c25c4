"""The report as one page of HTML that needs nothing else: tables, histograms, samples."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from codebook_jax.check_data.findings import Leak, Part
from codebook_jax.data.images import UnreadableImage, decode
from codebook_jax.data.sources import Source

_SAMPLES, _EXAMPLES = 48, 8
_THUMB_PX = 128
_BARS = 40
_SHOWN = 0.999  # of the values, before the last bar
_WIDTH, _HEIGHT = 640, 140
_STYLE = (
    "body{font:15px sans-serif;color:#1c1e22;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #dee0e4}"
    "td:first-child,th:first-child{text-align:left}.grid{display:flex;flex-wrap:wrap;gap:12px}"
    "figure{width:140px;margin:0;font-size:12px;overflow-wrap:anywhere}img{max-width:128px;max-height:128px}"
    "rect{fill:#5b7fa6}line{stroke:#b3261e}text{font-size:11px}"
)


def page(
    title: str, rows: Sequence[Sequence[str]], parts: Sequence[Part], leaks: Sequence[Leak], max_tokens: int
) -> str:
    """The whole page; `rows` are those of the table on the terminal, the first its head."""
    body = [f"<h1>{_text(title)}</h1>", _table(rows)]
    for part in parts:
        body += _about(part, max_tokens)
    for one in leaks:
        where = f"of {one.evaluation.label} in training"
        for found, what in (
            (one.content, "The same file" if one.decoded else "The same path"),
            (np.where(one.content < 0, one.look, -1), "The same look"),
            (np.where(one.name_alone, one.name, -1), "The same name alone"),
        ):
            body += _pairs(f"{what}: {where}", one.evaluation, one.training, found)
    content = "\n".join(body)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{content}</body></html>\n"
    )


def _about(part: Part, max_tokens: int) -> list[str]:
    """What is shown of one source."""
    cut = part.captions.truncated(max_tokens)
    body = [
        f"<h2>{_text(part.label)}</h2><p>{_text(repr(part.source))}</p>",
        f"<h3>Tokens a caption; {cut:,} of {part.captions.count:,} are longer than the {max_tokens} that are read</h3>",
        _histogram(part.captions.lengths, mark=max_tokens),
    ]
    sides = part.images.sides[part.images.sides[:, 0] > 0]
    if len(sides):
        for name, side in (("Shorter", sides.min(axis=1)), ("Longer", sides.max(axis=1))):
            body += [f"<h3>{name} side of a picture, px</h3>", _histogram(np.bincount(side))]
    body += ["<h3>A sample</h3>", _sample(part)]
    body += _pairs("Copies of another picture", part, part, part.copies)
    body += _pairs("Pictures that look like another", part, part, part.twins)
    if part.captions.most_repeated:
        repeated = [("caption", "pictures")]
        repeated += [(one.caption, f"{one.images:,}") for one in part.captions.most_repeated]
        body += ["<h3>Captions of several pictures</h3>", _table(repeated)]
    return body


def _text(text: str) -> str:
    """Text as HTML shows it; half a character of a broken name as a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in others]
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _histogram(counts: np.ndarray, mark: int | None = None) -> str:
    """Bars of equal width, as SVG, with a line at `mark`; `counts` [values] is how often each value comes.

    The last bar holds the few values that would make the others narrow.
    """
    reached = np.cumsum(counts) >= _SHOWN * counts.sum()
    top = max(int(np.argmax(reached)), mark or 0, 1) + 1
    step = -(-top // _BARS)
    bars = -(-top // step)
    held = np.bincount(np.minimum(np.arange(len(counts)) // step, bars - 1), counts, bars).astype(int)
    width, highest = _WIDTH / bars, max(1, int(held.max()))
    shapes = []
    for number, count in enumerate(held.tolist()):
        height = count / highest * _HEIGHT
        upto = "or more" if number + 1 == bars else f"to {number * step + step - 1}"
        shapes.append(
            f'<rect x="{number * width:.1f}" y="{_HEIGHT - height:.1f}" width="{max(width - 1, 1):.1f}" '
            f'height="{height:.1f}"><title>{number * step} {upto}: {count:,}</title></rect>'
        )
    if mark is not None:
        at = (mark + 1) / step * width
        shapes.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT}"/>')
    ends = (
        f'<text x="0" y="{_HEIGHT + 14}">0</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{(bars - 1) * step:,} or more</text>'
    )
    return f'<svg width="{_WIDTH}" height="{_HEIGHT + 20}">{"".join(shapes)}{ends}</svg>'


def _sample(part: Part) -> str:
    """Some of the pictures with their captions, the same ones each time."""
    usable = np.flatnonzero(part.images.usable)
    chosen = np.random.default_rng(0).permutation(usable)[:_SAMPLES]
    shown = [_figure(part.source, int(part.images.first[at])) for at in sorted(chosen.tolist())]
    return f'<div class="grid">{"".join(shown)}</div>'


def _pairs(title: str, part: Part, other: Part, found: np.ndarray) -> list[str]:
    """Pictures beside those that they are the same as."""
    chosen = np.flatnonzero(found >= 0)[:_EXAMPLES]
    if not len(chosen):
        return []
    count = int((found >= 0).sum())
    shown = [
        _figure(part.source, int(part.images.first[at]))
        + _figure(other.source, int(other.images.first[found[at]]))
        for at in chosen
    ]
    return [f"<h3>{_text(title)}: {count:,}</h3>", *(f'<div class="grid">{pair}</div>' for pair in shown)]


def _figure(source: Source, record: int) -> str:
    caption = _text(" · ".join(source.captions(record)[:2]))
    try:
        image = Image.fromarray(decode(source[record].image))
    except UnreadableImage as failure:
        return f"<figure>{_text(str(failure))}</figure>"
    image.thumbnail((_THUMB_PX, _THUMB_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    name = _text(source.name(record))
    return f'<figure><img alt="" title="{name}" src="data:image/jpeg;base64,{data}"><br>{caption}</figure>'
