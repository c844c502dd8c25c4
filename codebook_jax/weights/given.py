"""Reads the images and texts that a user passes to a loaded model; errors name the position."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codebook_jax.data.images import UnreadableImage, decode, rgb
from codebook_jax.errors import UserError

Picture = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray
Pictures = Picture | Iterable[Picture]
Texts = str | Iterable[str]

_ONE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
_UNORDERED = (Mapping, set, frozenset)


def as_pictures(given: Pictures) -> list[Picture]:
    """One picture or many as a list, with open files read; raises UserError for anything else."""
    if isinstance(given, jax.Array):
        given = np.asarray(given)
    if isinstance(given, np.ndarray) and given.dtype.kind in "USO":
        if given.ndim > 1:
            shape = list(given.shape)
            raise UserError(f"images is an array of paths with shape {shape}: give a list of paths")
        names = given.reshape(-1).tolist()
        given = list(map(os.fsdecode, names)) if given.dtype.kind == "S" else names
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim == 4 else [given]
    if isinstance(given, _ONE) or hasattr(given, "read"):
        return [_content(given, 0)]
    if not isinstance(given, Iterable) or isinstance(given, _UNORDERED):
        raise UserError(
            f"images={given!r} cannot be read: give paths, open files, PIL images or uint8 arrays, "
            "one or a list"
        )
    return [_content(picture, position) for position, picture in enumerate(given)]


def _content(picture: Picture, position: int) -> Picture:
    """The picture; for an open file its whole content, since it may be closed or read elsewhere
    later.
    """
    if isinstance(picture, bytearray | memoryview):
        return bytes(picture)
    if not hasattr(picture, "read"):
        return picture
    content = ""
    try:
        if not isinstance(picture, io.TextIOBase):
            if picture.seekable():
                picture.seek(0)
            content = picture.read()
    except (OSError, ValueError, AttributeError) as failure:  # ValueError: the file is closed
        raise UserError(
            f"image {position} cannot be read ({failure}): give an open file"
        ) from failure
    if not isinstance(content, bytes):
        raise UserError(f'image {position} is a file opened as text: use open(path, "rb")')
    return content


def pixels_of(picture: Picture, position: int) -> UInt8[np.ndarray, "height width 3"]:
    """RGB of one given picture; raises UserError naming the position and the problem."""
    try:
        if isinstance(picture, Image.Image):
            return _rgb_of(picture)
        if isinstance(picture, str | bytes | os.PathLike):
            return decode(picture if isinstance(picture, bytes) else os.path.expanduser(picture))
        if isinstance(picture, np.ndarray | jax.Array):
            return _rgb_array(np.asarray(picture))
    except UnreadableImage as failure:
        raise UserError(f"image {position}: {failure}") from failure
    raise UserError(
        f"image {position} is a {type(picture).__name__}: give a path, an open file, a PIL image "
        "or a uint8 array"
    )


def _rgb_of(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if 0 in picture.size:
        raise UnreadableImage(f"a PIL image of {picture.width} x {picture.height} has no pixels")
    try:
        return np.asarray(rgb(picture))
    except Exception as failure:  # Pillow opened the file but cannot read all of it
        raise UnreadableImage(f"the PIL image cannot be read: {failure}") from failure


def _rgb_array(array: np.ndarray) -> np.ndarray:
    """The array as [height, width, 3]; raises UnreadableImage if its meaning is ambiguous."""
    shown = f"an array of {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise UnreadableImage(
            f"{shown} may be in 0..1 or in 0..255: give uint8, for 0..1 (255 * "
            "image).round().astype('uint8')"
        )
    if array.size == 0:
        raise UnreadableImage(f"{shown} has no pixels")
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim == 3 and array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        raise UnreadableImage(f"{shown} has its channels first: give image.transpose(1, 2, 0)")
    if array.ndim != 3 or array.shape[2] != 3:
        raise UnreadableImage(f"{shown} is neither [height, width, 3] nor [height, width]")
    return array


def as_texts(given: Texts) -> list[str]:
    """One text or many as a list; raises UserError if they are not strings."""
    try:
        texts = [given] if isinstance(given, str) else list(given)
    except TypeError:
        texts = None
    if texts is None or isinstance(given, _UNORDERED):
        raise UserError(f"texts={given!r} cannot be read: give a string or a list of strings")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {position} is a {type(text).__name__}: give strings")
    return texts
