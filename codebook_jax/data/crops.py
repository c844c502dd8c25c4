"""Random crops of a picture: drawn first, decoded no larger than needed, cut and resized."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from codebook_jax.data.images import Picture

Range = Sequence[float]  # lowest, highest

cv2.setNumThreads(1)  # the pipeline has its own threads and worker processes

_CROP_TRIES = 10  # torchvision's
_CUBIC = 1.5  # up to this factor, cubic interpolation is closer to Pillow's bicubic; then linear
_TWICE = 2.5  # above this factor, neither is close


def random_crops(
    picture: Picture,
    rng: np.random.Generator,
    out: UInt8[np.ndarray, "crops size size 3"],
    *,
    scale: Range,
    ratio: Range,
) -> None:
    """Fills `out` with random parts of the picture, all from one decoding.

    `scale` bounds the share of the area, `ratio` width over height before the resize. Drawn as in
    torchvision's RandomResizedCrop. Raises UnreadableImage if the pixels cannot be decoded.
    """
    size = picture.height, picture.width
    boxes = [crop_box(*size, rng, scale=scale, ratio=ratio) for _ in out]
    least = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
    shrink = max(by for by in picture.shrinks if by == 1 or least >= by * out.shape[1])
    pixels = picture.pixels(shrink)
    for (left, top, right, bottom), crop in zip(boxes, out, strict=True):
        rows = slice(top // shrink, -(-bottom // shrink))
        resize(pixels[rows, left // shrink : -(-right // shrink)], crop)


def resize(
    part: UInt8[np.ndarray, "height width 3"], out: UInt8[np.ndarray, "size size 3"]
) -> None:
    """Fills the square `out` with the part: bicubic to enlarge, antialiased to reduce.

    To reduce, interpolates to twice the size and averages 2 x 2: as close to Pillow's antialiased
    bicubic as Pillow's bilinear is, in a quarter of the time. Above a factor of 2.5, where
    interpolation would skip pixels, averages the area.
    """
    longest, size = max(part.shape[:2]), len(out)
    if longest <= size:
        out[:] = Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)
        return
    if longest <= _TWICE * size:
        nearer = cv2.INTER_CUBIC if longest <= _CUBIC * size else cv2.INTER_LINEAR
        part = cv2.resize(part, (2 * size, 2 * size), interpolation=nearer)
    cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_AREA)


def crop_box(
    height: int, width: int, rng: np.random.Generator, *, scale: Range, ratio: Range
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop; after ten tries, a central one of near ratio.
    With a scale of 1 it is the whole picture, whatever its ratio.
    """
    if scale[0] >= 1:
        return 0, 0, width, height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        target = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        across, down = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(rng.integers(0, height - down + 1))
            left = int(rng.integers(0, width - across + 1))
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
