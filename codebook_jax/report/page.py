"""One file of HTML from a template, with everything it needs inside it."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from codebook_jax.files import written_whole

FILE = "report.html"
THUMBNAIL_PX = 120  # of the longer side
MOST_BYTES = 7_500_000  # of the pictures in a page

_FOLDER = Path(__file__).parent
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f]")  # all but tab and newline


class Pictures:
    """Thumbnails, each in the page once, up to `most_bytes`; `left_out` is how many did not fit."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.files: dict[str, dict[str, str]] = {}  # name -> {"jpeg": base64, "alt": text}
        self._room, self._refused = most_bytes, set()

    @property
    def left_out(self) -> int:
        return len(self._refused)

    def add(self, name: str, pixels: np.ndarray, alt: str) -> None:
        """Keeps a picture, uint8 RGB [height, width, 3], under a name; `alt` says what it shows."""
        image = Image.fromarray(pixels)
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80, optimize=True)
        text = base64.b64encode(file.getvalue()).decode()
        if len(text) > self._room:
            self._refused.add(name)
            return
        self._room -= len(text)
        self.files[name] = {"jpeg": text, "alt": alt}

    def knows(self, name: str) -> bool:
        """Whether a picture of this name was added, even if it did not fit."""
        return name in self.files or name in self._refused


def write_page(path: Path | str, template: str, **values: Any) -> None:
    """Writes the page; `values` fill the template, without the characters that browsers cannot
    show.
    """
    text = _environment().get_template(template).render(**values)
    with written_whole(path) as file:
        file.write(_shown(text))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,  # captions are shown as text, whatever they hold
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_function"] = _json
    environment.globals["asset"] = _asset
    environment.filters["count"] = "{:,}".format
    environment.filters["plain"] = _plain
    environment.filters["percent"] = lambda share, places=1: f"{100 * share:.{places}f}\u00a0%"
    return environment


def _json(value: Any, **options: Any) -> str:
    return json.dumps(_shown(value), **options)


def _shown(value: Any) -> Any:
    """All texts in `value` without control characters; broken characters, as in a file name, become
    question marks.
    """
    if isinstance(value, dict):
        return {_shown(name): _shown(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return (
        _CONTROL.sub("", value).encode(errors="replace").decode()
        if isinstance(value, str)
        else value
    )


def _plain(value: Any) -> str:
    """A setting's value as text: a non-empty string as it is, everything else as JSON."""
    return value if value and isinstance(value, str) else json.dumps(value)


def _asset(name: str) -> Markup:
    """A file of this package, unescaped: never use it for data."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))
