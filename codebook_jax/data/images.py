"""Decodes picture files to uint8 RGB."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # EXIF
_PHOTOMETRIC = 262  # TIFF: 0 if the smallest number is white
# Not EPS: it would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")

Pixels = UInt8[np.ndarray, "height width 3"]


class UnreadableImage(Exception):
    """A picture cannot be read; the message names it and says why in one short sentence."""


class Picture:
    """A picture whose size is known; the pixels of most JPEGs are not decoded yet."""

    def __init__(self, image: Pixels | bytes | str | os.PathLike, name: str | None = None) -> None:
        """Raises UnreadableImage, naming `name` or the path, if it is not a picture."""
        self._array: Pixels | None = None
        self.shrinks: tuple[int, ...] = (1,)  # the factors by which `pixels` can divide the sides
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UnreadableImage(
                    f"an array of {image.dtype} {image.shape} is not uint8 [height, width, 3]"
                )
            self.content = self._array = image
            self.height, self.width = image.shape[:2]
            return
        of_bytes = isinstance(image, bytes)
        self._name = name or (f"{len(image):,} bytes" if of_bytes else os.fspath(image))
        with _named(self._name):
            self.content = image if of_bytes else Path(image).read_bytes()
            if not self.content:
                raise ValueError("the file is empty")
            with _opened(self.content) as opened:
                self.width, self.height = opened.size
                if _is_plain_jpeg(opened, self.content):
                    self.shrinks = (1, 2, 4, 8)
                else:
                    self._array = np.asarray(rgb(opened))
                    self.height, self.width = self._array.shape[:2]

    def pixels(self, shrink: int = 1) -> Pixels:
        """The picture at 1 / `shrink` of its size, rounded up, by averaging: see `decode`.

        `shrink` is one of `shrinks`. Raises UnreadableImage if the file is truncated or damaged.
        """
        if self._array is not None:
            return self._array
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        least = {"min_height": height, "min_width": width, "min_factor": shrink}
        with _named(self._name):
            try:
                pixels = simplejpeg.decode_jpeg(self.content, **least)
            except ValueError:  # simplejpeg is strict: Pillow decides what is damaged
                with _opened(self.content) as opened:
                    pixels = np.asarray(rgb(opened))
        if pixels.shape[:2] != (height, width):
            box = Image.Resampling.BOX
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), box))
        return pixels


def decode(image: Pixels | bytes | str | os.PathLike) -> Pixels:
    """The picture of an array, the bytes of a file, or its path: upright, transparency on white.

    Raises UnreadableImage if it is missing, damaged, not a picture, or over Pillow's size limit.
    """
    return Picture(image).pixels()


def resize_square(image: Pixels, size_px: int) -> UInt8[np.ndarray, "size_px size_px 3"]:
    """The whole picture in a square of `size_px`, bicubic: what evaluation sees (ALBEF)."""
    if image.shape[:2] == (size_px, size_px):
        return image
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB, upright, transparency on white.

    Raises ValueError for a grey whose range is unknown.
    """
    # Pillow's name for the numbers in the file, lost once the pixels are loaded.
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    raw = str(args[0] if isinstance(args, tuple) and args else args)
    # Pillow inverts negatives of 8 bits only.
    negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image.load()
    with contextlib.suppress(Exception):  # of a broken EXIF block; the pixels are fine
        image = ImageOps.exif_transpose(image)
    # The one transparent colour, as stored: Pillow compares it with pixels of eight bits.
    colour = image.info.get("transparency")
    if image.mode[0] in "IF":
        values = np.asarray(image)
        grey = _eight_bits(values, image.mode, raw)
        image = Image.fromarray(255 - grey if negative else grey)
        if isinstance(colour, int):
            image.putalpha(Image.fromarray(np.uint8(255) * (values != colour)))
    elif image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}.get(raw, 1)
    elif isinstance(colour, tuple) and (raw == "RGB;16B" or max(colour) > 255):
        image.info["transparency"] = tuple(part >> 8 for part in colour)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(
    values: Shaped[np.ndarray, "height width"], mode: str, raw: str
) -> UInt8[np.ndarray, "height width"]:
    """Grey of whole numbers up to 255, 4095 or 65535, or floats up to 1, else raises ValueError."""
    if mode == "F":
        most = 1
    elif raw == "I;12":
        most = 4095
    else:
        most = 65535 if "16" in mode + raw or values.max() > 255 else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # also catches NaN
        raise ValueError(f"its grey values range from {low:g} to {high:g}, not from 0 to {most}")
    return np.rint(values * (255 / most)).astype(np.uint8)


def _opened(content: bytes) -> Image.Image:
    opened, most = Image.open(io.BytesIO(content), formats=_FORMATS), Image.MAX_IMAGE_PIXELS
    width, height = opened.size
    if most is not None and width * height > most:
        raise ValueError(f"{width:,} x {height:,} pixels are over the limit of {most:,}")
    return opened


def _is_plain_jpeg(opened: Image.Image, content: bytes) -> bool:
    """Whether libjpeg-turbo decodes the file exactly as Pillow does."""
    if opened.format not in ("JPEG", "MPO"):
        return False
    with contextlib.suppress(Exception):  # of a broken EXIF block, as in `rgb`
        if opened.getexif().get(_ORIENTATION, 1) not in (0, 1):
            return False
    with contextlib.suppress(ValueError):
        return simplejpeg.decode_jpeg_header(content)[2] in ("YCbCr", "Gray")
    return False


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns anything a decoder raises into UnreadableImage with one sentence about `name`."""
    try:
        yield
    except Exception as failure:  # OSError, SyntaxError, struct.error, ...
        reason = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
        if isinstance(failure, UnidentifiedImageError):
            reason = f"not a picture in a supported format ({', '.join(_FORMATS)})"
        raise UnreadableImage(f"{name or 'an empty path'}: {reason}") from failure
