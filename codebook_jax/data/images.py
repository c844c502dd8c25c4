"""From a picture in a file to uint8 RGB, and the crops and sizes that the models read."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_CROP_TRIES = 10  # torchvision's


class UnreadableImage(Exception):
    """One short sentence: which picture cannot be read, and why."""


def decode(image: UInt8[np.ndarray, "height width 3"] | bytes | str | os.PathLike) -> np.ndarray:
    """The picture as uint8 RGB [height, width, 3]: upright, transparency on white; an array is returned as it is.

    Takes an array, the bytes of a file, or its path. Raises UnreadableImage for what is missing, empty, cut short,
    not a picture, or larger than Pillow's limit.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UnreadableImage(
                f"an array of {image.dtype} {image.shape} is not uint8 [height, width, 3]"
            )
        return image
    name = f"{len(image):,} bytes" if isinstance(image, bytes) else os.fspath(image)
    try:
        if isinstance(image, bytes):
            content = image
        else:
            with open(image, "rb") as file:
                content = file.read()
        if not content:
            raise UnreadableImage(f"{name}: the file is empty")
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise UnreadableImage(
                    f"{name}: {width:,} x {height:,} pixels are over the limit of {Image.MAX_IMAGE_PIXELS:,}"
                )
            opened.load()
            return np.asarray(rgb(upright(opened)))
    except UnreadableImage:
        raise
    except (
        Exception
    ) as failure:  # decoders fail in every way there is: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"{name}: {_reason(failure)}") from failure


def resize_square(image: UInt8[np.ndarray, "height width 3"], size_px: int) -> np.ndarray:
    """The whole picture in a square of `size_px`, bicubic: what evaluation sees (ALBEF)."""
    if image.shape[:2] == (size_px, size_px):
        return image
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def random_crop(
    image: UInt8[np.ndarray, "height width 3"],
    rng: np.random.Generator,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    size_px: int,
) -> np.ndarray:
    """A random part of the picture in a square of `size_px`, bicubic.

    `scale` bounds the area kept, `ratio` width over height before the resize. Drawn as torchvision's RandomResizedCrop.
    """
    box = crop_box(image.shape[0], image.shape[1], rng, scale=scale, ratio=ratio)
    if box == (0, 0, image.shape[1], image.shape[0]):
        return resize_square(image, size_px)
    left, top, right, bottom = box
    part = Image.fromarray(
        image[top:bottom, left:right]
    )  # cut first: no pixel outside the crop is blended in
    return np.asarray(part.resize((size_px, size_px), Image.Resampling.BICUBIC))


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop: ten tries, then the middle at the nearest ratio allowed."""
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        target = area * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        across, down = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(rng.integers(0, height - down + 1))
            left = int(rng.integers(0, width - across + 1))
            return left, top, left + across, top + down
    across, down = width, height
    if width / height < ratio[0]:
        down = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        across = max(1, round(height * ratio[1]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing of the rotation, and the pixels are sound
        return image


def rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB, by what its numbers mean."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        grey = np.asarray(image).astype(np.int64)
        deep = image.mode.startswith("I;16") or grey.max(initial=0) > 255
        grey = np.clip(grey >> 8 if deep else grey, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reason(failure: Exception) -> str:
    if isinstance(failure, FileNotFoundError):
        return "there is no such file"
    if isinstance(failure, IsADirectoryError):
        return "this is a folder"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    if type(failure).__name__ == "UnidentifiedImageError":
        return "not a picture in a format that Pillow reads"
    return f"{failure}" or type(failure).__name__
