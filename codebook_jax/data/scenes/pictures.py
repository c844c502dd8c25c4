"""The picture of a scene, at any resolution."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from codebook_jax.data.scenes.world import Background, Scene, SceneObject

_SUPERSAMPLING = 4
_CONTRAST = 16  # of a texture, of 255
_NOISE = 7  # standard deviation of the clouds over it, of 255

_ARM = 0.33  # half the width of a cross's arms
_CROSS = [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
_STAR = [(math.pi * (corner / 5 - 0.5), (1.0, 0.42)[corner % 2]) for corner in range(10)]
_CORNERS = {  # of the shapes with straight edges, in a box of -1 to 1
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "cross": [*_CROSS, *((-x, -y) for x, y in _CROSS)],
    "star": [(reach * math.cos(angle), reach * math.sin(angle)) for angle, reach in _STAR],
}


def render(scene: Scene, size_px: int) -> UInt8[np.ndarray, "size_px size_px 3"]:
    """The scene's picture in RGB; the same at every size except for detail."""
    image = _paint_background(scene.background, size_px)
    for thing in scene.objects:
        _paint_object(image, thing)
    return np.asarray(image)


def _paint_background(background: Background, size_px: int) -> Image.Image:
    """Computes only the lightness of each pixel; a table maps it to the background's colours."""
    phase, along = background.phase, np.arange(size_px, dtype=np.float32) + 0.5
    along *= 2 * math.pi * background.periods / size_px
    if background.texture == "striped":
        across, down = math.cos(background.angle), math.sin(background.angle)
        wave = np.sin((along * down + phase)[:, None] + along * across)
    elif background.texture == "checked":
        wave = np.multiply.outer(np.sin(along + phase), np.sin(along + phase))
    elif background.texture == "dotted":
        wave = np.add.outer(np.cos(along + phase) - 1.1, np.cos(along + phase))
    else:
        wave = np.zeros((size_px, size_px), np.float32)
    wave = np.clip(wave * (4 * _CONTRAST), -_CONTRAST, _CONTRAST)
    noise = np.random.default_rng(background.noise_seed).normal(128, _NOISE, (16, 16))
    clouds = Image.fromarray(noise.astype(np.float32))
    wave += np.asarray(clouds.resize((size_px, size_px), Image.Resampling.BILINEAR))
    lightness = wave.astype(np.uint8).tobytes()
    levels = np.arange(-128, 128) + np.array(background.colour)[:, None]
    tables = np.clip(levels, 0, 255).astype(np.uint8)  # of red, green and blue
    channels = [lightness.translate(table.tobytes()) for table in tables]
    return Image.merge("RGB", [Image.frombytes("L", (size_px, size_px), c) for c in channels])


def pixel_box(thing: SceneObject, size_px: int) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the smallest box around the object's pixels in a picture."""
    mask, (x, y) = _mask(thing, size_px)
    left, top, right, bottom = mask.getbbox()
    return float(x + left), float(y + top), float(right - left), float(bottom - top)


def _paint_object(image: Image.Image, thing: SceneObject) -> None:
    mask, corner = _mask(thing, image.width)
    image.paste(thing.paint, corner, mask)


def _mask(thing: SceneObject, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The object's share of each pixel of its box only, and the box's left and top: drawn enlarged
    and shrunk, for smooth edges.
    """
    left, top, right, bottom = (value * side for value in thing.box)
    box = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    fine = _SUPERSAMPLING
    mask = Image.new("L", (fine * (box[2] - box[0]), fine * (box[3] - box[1])))
    x, y = fine * (thing.x * side - box[0]), fine * (thing.y * side - box[1])
    _draw_shape(ImageDraw.Draw(mask), thing.shape, x, y, fine * thing.radius * side)
    return mask.reduce(fine), box[:2]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    if shape in _CORNERS:
        pen.polygon([(x + r * right, y + r * down) for right, down in _CORNERS[shape]], fill=255)
        return
    pen.circle((x, y), r, fill=255)
    if shape == "ring":
        pen.circle((x, y), 0.5 * r, fill=0)
    elif shape == "moon":
        pen.circle((x + 0.5 * r, y - 0.2 * r), 0.8 * r, fill=0)
