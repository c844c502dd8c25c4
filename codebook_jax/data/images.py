"""Decodes picture files to uint8 RGB."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

_TURNED = (b"Exif\0\0", b"tiff:Orientation")  # where a file may store its rotation
_ORIENTATION = 0x0112  # EXIF
_PHOTOMETRIC = 262  # TIFF: 0 if the smallest number is white
_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
)  # EPS would start Ghostscript
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


class UnreadableImage(Exception):
    """A picture cannot be read; the message names it and says why in one short sentence."""


class Picture:
    """A picture whose size is known and whose pixels are not decoded yet."""

    def __init__(
        self,
        image: UInt8[np.ndarray, "height width 3"] | bytes | str | os.PathLike,
        name: str | None = None,
    ) -> None:
        """Takes an array, the bytes of a file, or its path; raises UnreadableImage if it is not a
        picture.

        `name` identifies the picture in messages (None: the path, or the number of bytes).
        """
        self._array, self._content, self._pillow = None, b"", None
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UnreadableImage(
                    f"an array of {image.dtype} {image.shape} is not uint8 [height, width, 3]"
                )
            self._array = image
            self.height, self.width = image.shape[:2]
            return
        self._name = name or (
            f"{len(image):,} bytes" if isinstance(image, bytes) else os.fspath(image)
        )
        with _saying(self._name):
            self._content = image if isinstance(image, bytes) else _read(image)
            if not self._content:
                raise UnreadableImage(f"{self._name}: the file is empty")
            size = _plain_jpeg_size(self._content)
            if size is None:
                self._pillow = _opened(self._content)
                size = self._pillow.size[::-1]
            height, width = size
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise UnreadableImage(
                    f"{self._name}: {width:,} x {height:,} pixels are over the limit of "
                    f"{Image.MAX_IMAGE_PIXELS:,}"
                )
            if self._pillow is not None:
                self._array = self._decoded()
                height, width = self._array.shape[:2]
        self.height, self.width = height, width

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """uint8 RGB [height / shrink, width / shrink, 3], rounded up: upright, transparency on
        white.

        A JPEG can be decoded at 1/2, 1/4 or 1/8, each pixel the mean of those it replaces; for
        other formats `shrink` must be 1. Raises UnreadableImage if the file is truncated or
        damaged.
        """
        if shrink == 1 and self._array is not None:
            return self._array
        if shrink not in self.shrinks:
            raise ValueError(f"shrink={shrink} is not one of {self.shrinks}")
        size = -(-self.height // shrink), -(-self.width // shrink)
        with _saying(self._name):
            try:
                pixels = simplejpeg.decode_jpeg(
                    self._content, min_height=size[0], min_width=size[1], min_factor=shrink
                )
            except ValueError:  # simplejpeg is strict: Pillow decides what is damaged
                self._pillow = _opened(self._content)
                pixels = self._decoded()
        if pixels.shape[:2] != size:
            pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX))
        return pixels

    @property
    def content(self) -> bytes | np.ndarray:
        """The bytes of the file, or the array if there is no file."""
        return self._content or self._array

    @property
    def shrinks(self) -> tuple[int, ...]:
        """The factors by which `pixels` can divide the sides."""
        return (1,) if self._array is not None else (1, 2, 4, 8)

    def _decoded(self) -> np.ndarray:
        with self._pillow as opened:
            return np.asarray(rgb(opened))


def decode(image: UInt8[np.ndarray, "height width 3"] | bytes | str | os.PathLike) -> np.ndarray:
    """The picture as uint8 RGB [height, width, 3]: upright, transparency on white; an array is
    returned unchanged.

    Takes an array, the bytes of a file, or its path. Raises UnreadableImage if it is missing,
    empty, truncated, not a picture, or larger than Pillow's limit.
    """
    return Picture(image).pixels()


def resize_square(image: UInt8[np.ndarray, "height width 3"], size_px: int) -> np.ndarray:
    """The whole picture in a square of `size_px`, bicubic: what evaluation sees (ALBEF)."""
    if image.shape[:2] == (size_px, size_px):
        return image
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # with a broken EXIF block the rotation is unknown, but the pixels are fine
        return image


def rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB, upright, transparency on white; raises ValueError if the range
    is unknown.
    """
    raw = _raw_mode(image)  # lost once the pixels are loaded
    negative = (
        getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    )  # Pillow inverts 8-bit values only
    image.load()
    image = _upright(image)
    hidden = _hidden(image, raw)
    if image.mode[0] in "IF":
        grey = _eight_bits(np.asarray(image), image.mode, raw)
        image = Image.fromarray(255 - grey if negative else grey)
    if hidden is not None:
        pixels = np.array(image.convert("RGB"))
        pixels[hidden] = 255
        return Image.fromarray(pixels)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the number format in the file; empty if it is no longer known."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _hidden(image: Image.Image, raw: str) -> np.ndarray | None:
    """bool [height, width]: the pixels of the one transparent colour; None if transparency is
    stored otherwise.

    Pillow compares the colour as stored with pixels already converted to eight bits.
    """
    colour = image.info.get("transparency")
    if not isinstance(colour, int | tuple) or image.mode not in ("1", "L", "I", "I;16", "RGB"):
        return None
    colour = np.array(colour) * {"L;2": 85, "L;4": 17}.get(raw, 1)
    if image.mode == "RGB":
        deep = raw == "RGB;16B" or colour.max() > 255
        return (np.asarray(image) == (colour >> 8 if deep else colour)).all(axis=-1)
    return np.asarray(image.convert("L") if image.mode == "1" else image) == colour


def _eight_bits(values: np.ndarray, mode: str, raw: str) -> UInt8[np.ndarray, "height width"]:
    """Grey from whole numbers up to 255, 4095 or 65535, or floats from 0 to 1; raises ValueError
    for other ranges.
    """
    if mode == "F":
        most = 1
    elif raw == "I;12":
        most = 4095
    else:
        most = 65535 if "16" in mode + raw or values.max() > 255 else 255
    if not (values.min() >= 0 and values.max() <= most):  # also catches NaN
        kind = "floats from 0 to 1" if mode == "F" else "whole numbers from 0 to 65535"
        raise ValueError(
            f"its grey values range from {values.min():g} to {values.max():g}; only {kind} can be "
            "read"
        )
    return np.rint(values * (255 / most)).astype(np.uint8)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF needs Pillow 11.3


def _opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=_formats())


def _read(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that libjpeg-turbo decodes exactly as Pillow does; None for any
    other file.
    """
    if not content.startswith(b"\xff\xd8"):
        return None
    head = _before_pixels(content)
    if any(mark in head for mark in _TURNED) and _is_turned(content):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "Gray") else None


def _before_pixels(content: bytes) -> bytes:
    """The segments of a JPEG up to its first scan, or to the first bytes that are not a segment."""
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content[:at]


def _is_turned(content: bytes) -> bool:
    with _opened(content) as opened:
        try:
            return opened.getexif().get(_ORIENTATION, 1) not in (0, 1)
        except Exception:  # as in `_upright`
            return False


@contextlib.contextmanager
def _saying(name: str) -> Iterator[None]:
    """Turns anything a decoder raises into UnreadableImage with one sentence about `name`."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as failure:  # OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"{name or 'an empty path'}: {_reason(failure)}") from failure


def _reason(failure: Exception) -> str:
    if isinstance(failure, FileNotFoundError):
        return "the file does not exist"
    if isinstance(failure, IsADirectoryError):
        return "it is a folder"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    if type(failure).__name__ == "UnidentifiedImageError":
        return f"not a picture in a supported format ({', '.join(_formats())})"
    return f"{failure}" or type(failure).__name__
