"""Reads the images and texts that a user passes to a loaded model; errors name the position."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codebook_jax.data.images import decode, rgb
from codebook_jax.errors import UserError

Picture = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray
Pictures = Picture | Iterable[Picture]
Texts = str | Iterable[str]

_ARRAY = (np.ndarray, jax.Array)
_ONE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
_UNORDERED = (Mapping, set, frozenset)
_GIVE = "give a path, an open file, a PIL image or a uint8 array"


def picture_list(images: Pictures) -> list[Picture]:
    """One picture or many as a list, with open files read; raises UserError for anything else."""
    if isinstance(images, _ARRAY) and images.dtype.kind not in "USO":
        return list(np.asarray(images)) if images.ndim == 4 else [np.asarray(images)]
    if isinstance(images, _ONE) or hasattr(images, "read"):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, _UNORDERED):
        raise UserError(f"images={images!r} cannot be read: {_GIVE}, or a list")
    return [_content(picture, position) for position, picture in enumerate(images)]


def text_list(texts: Texts) -> list[str]:
    """One text or many as a list; raises UserError if they are not strings."""
    if not isinstance(texts, Iterable) or isinstance(texts, _UNORDERED):
        raise UserError(f"texts={texts!r} cannot be read: give a string or a list of strings")
    found = [texts] if isinstance(texts, str) else list(texts)
    for position, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"text {position} is a {type(text).__name__}: give strings")
    return found


def pixels_of(picture: Picture, position: int) -> UInt8[np.ndarray, "height width 3"]:
    """RGB of one picture; raises UserError naming the position and the problem."""
    try:
        if isinstance(picture, bytes | bytearray | memoryview):
            return decode(bytes(picture))
        if isinstance(picture, str | os.PathLike):
            return decode(os.path.expanduser(picture))
        if isinstance(picture, Image.Image):
            picture = np.asarray(rgb(picture))
        if isinstance(picture, _ARRAY):
            array = np.asarray(picture)
            array = array[:, :, None] if array.ndim == 2 else array
            if not array.size:
                raise ValueError("it has no pixels")
            return decode(array.repeat(3, axis=2) if array.shape[2:] == (1,) else array)
    except Exception as failure:  # ours, or Pillow's: it opens a file before it reads all of it
        raise UserError(f"image {position}: {failure}") from failure
    raise UserError(f"image {position} is a {type(picture).__name__}: {_GIVE}")


def _content(picture: Picture, position: int) -> Picture:
    """The picture; for an open file its whole content, since it may be closed later."""
    if not hasattr(picture, "read"):
        return picture
    try:
        if picture.seekable():
            picture.seek(0)
        return bytes(picture.read())
    except (OSError, ValueError, TypeError) as failure:  # it is closed, or opened as text
        raise UserError(
            f'image {position} cannot be read ({failure}): open files with open(path, "rb")'
        ) from failure
