"""One file of HTML from a template, with everything it needs inside it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

from codebook_jax.console import duration
from codebook_jax.files import written_whole

FILE = "report.html"
THUMBNAIL_PX = 120  # of the longer side
MOST_BYTES = 7_500_000  # of the pictures in a page

_FOLDER = Path(__file__).parent
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f]")  # all but tab and newline


class Pictures:
    """Thumbnails, each in the page once, up to `most_bytes`."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.files: dict[str, dict[str, str]] = {}  # name -> {"jpeg": base64, "alt": text}
        self.left_out: set[str] = set()  # names of those that did not fit
        self._room = most_bytes

    def add(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], alt: str) -> None:
        """Keeps a picture under a name, unless it is there already; `alt` says what it shows."""
        if name in self.files:
            return
        image = Image.fromarray(pixels)
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80, optimize=True)
        text = base64.b64encode(file.getvalue()).decode()
        if len(text) > self._room:
            self.left_out.add(name)
            return
        self._room -= len(text)
        self.files[name] = {"jpeg": text, "alt": alt}


def write_page(path: Path | str, template: str, pictures: Pictures, **values: Any) -> None:
    """Writes the page: the template filled with `values`, plain dicts, lists and texts."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,  # captions are shown as text, whatever they hold
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # a file of this package, unescaped
    environment.globals["asset"] = lambda name: Markup((_FOLDER / name).read_text("utf-8"))
    environment.filters["count"] = "{:,}".format
    environment.filters["duration"] = duration
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\u00a0%"
    environment.filters["figure"] = _figure
    # a setting: a non-empty text as it is, everything else as JSON
    environment.filters["plain"] = lambda v: v if v and isinstance(v, str) else json.dumps(v)
    values |= {"pictures": pictures.files, "left_out": len(pictures.left_out)}
    with written_whole(path) as file:
        file.write(environment.get_template(template).render(_shown(values)))


def _figure(value: Any) -> str:
    """A count as it is, another number with two decimals, anything else as JSON; None: nothing."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and value > 100 else f"{value:.2f}"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else json.dumps(value)


def _shown(value: Any) -> Any:
    """The value with its texts as browsers can show them: no control or broken characters."""
    if isinstance(value, dict):
        return {_shown(name): _shown(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    if isinstance(value, str):
        return _CONTROL.sub("", value).encode(errors="replace").decode()
    return value
