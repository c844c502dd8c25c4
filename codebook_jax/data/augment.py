"""Augmentation on the device: mirroring, RandAugment without colour operations, normalisation.

Every image passes the three stages of a layer: a lookup table per channel, a 3x3 sharpening, an
affine warp. The drawn operation sets the parameters of its stage; the other stages get neutral
ones, which leave every bit unchanged. So all ten operations cost one pass, and no image needs
another device's.

Ranges, fill and probability are those of ALBEF's public code (Li et al. 2021); pixel arithmetic is
PIL's, and every stage ends in uint8. Departures: translation scales with the side; the outermost
source pixel is not blended with the fill; shear and rotation count from pixel corners.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray, Shaped, UInt8

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's and ALBEF's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)

HIGHEST_MAGNITUDE = 10
APPLY_PROBABILITY = 0.5  # ALBEF: each drawn operation is skipped half of the time
FILL = 128
_SHEAR = 0.3  # at the highest magnitude, as are the next three
_TRANSLATE = 10 / 256  # of the side; ALBEF: 10 pixels, of 256 in pre-training
_ROTATE_DEGREES = 30.0
_ENHANCE_SPAN, _ENHANCE_LEAST = 1.8, 0.1

_ONE_BITS = 16  # fraction bits of a matrix entry in `warp`: sides up to 4096 fit 32 bits
# Of an interpolation weight: two weights and a pixel value fill the 24 bits of a float32.
_SHARE_BITS = 8

Images = UInt8[Array, "batch side side 3"]
Pixels = Float32[Array, "batch side side 3"]
Operations = Int32[Array, "batch"]
Signs = Float32[Array, "batch"]
Rows = Shaped[Array, "batch ..."]
Counts = Int32[Array, "batch 3 256"]  # of the pixels of each value
Tables = Int32[Array, "batch 3 256"]  # the new value of each value
Matrices = Float32[Array, "batch 2 3"]  # output (x, y, 1), in pixels from the corner, to source

_NAMES = "IDENTITY AUTO_CONTRAST EQUALISE BRIGHTNESS SHARPNESS "
_NAMES += "SHEAR_X SHEAR_Y TRANSLATE_X TRANSLATE_Y ROTATE"
Operation = enum.IntEnum("Operation", _NAMES, start=0)  # all drawn equally often


def augment(
    images: Images, flip: Bool[Array, " batch"], key: PRNGKeyArray, *, layers: int, magnitude: float
) -> Pixels:
    """The images, mirrored where `flip`, then changed by `layers` random operations each.

    RandAugment (Cubuk et al. 2020) with ALBEF's ranges: `magnitude` is 0..10. Values stay in
    0..255. Operations depend only on the key and the place in the global batch.
    """
    images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
    if layers:
        operations, signs = draw(key, len(images), layers)
        for layer in range(layers):
            images = apply(images, operations[:, layer], signs[:, layer], magnitude=magnitude)
    return images.astype(jnp.float32)


def normalise(images: Images | Pixels, dtype: DTypeLike) -> Float[Array, "batch side side 3"]:
    """Pixels in 0..255 as the encoders expect them, computed in float32."""
    images = images.astype(jnp.float32) / 255  # bfloat16 has no 256 even steps
    mean, std = jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32)
    return ((images - mean) / std).astype(dtype)


def draw(
    key: PRNGKeyArray, batch: int, layers: int
) -> tuple[Int32[Array, "batch layers"], Float32[Array, "batch layers"]]:
    """Each image's operations, with replacement, identity where skipped; and their signs."""
    which, whether, sign = jax.random.split(key, 3)
    operations = jax.random.randint(which, (batch, layers), 0, len(Operation), jnp.int32)
    applied = jax.random.bernoulli(whether, jnp.float32(APPLY_PROBABILITY), (batch, layers))
    positive = jax.random.bernoulli(sign, jnp.float32(0.5), (batch, layers))
    signs = jnp.where(positive, jnp.float32(1), jnp.float32(-1))
    return jnp.where(applied, operations, Operation.IDENTITY.value), signs


def apply(images: Images, operations: Operations, signs: Signs, *, magnitude: float) -> Images:
    """Each image after its own operation; the sign is that of warps alone, as in ALBEF."""
    enhance = magnitude / HIGHEST_MAGNITUDE * _ENHANCE_SPAN + _ENHANCE_LEAST
    counts, values = histograms(images), jnp.arange(256, dtype=jnp.int32)
    brighter = jnp.clip(values.astype(jnp.float32) * enhance, 0, 255).astype(jnp.int32)
    tables = {
        Operation.AUTO_CONTRAST: auto_contrast_tables(counts),
        Operation.EQUALISE: equalise_tables(counts),
        Operation.BRIGHTNESS: jnp.broadcast_to(brighter, counts.shape),
    }
    images = look_up(images, _choose(tables, jnp.broadcast_to(values, counts.shape), operations))
    sharper = operations == Operation.SHARPNESS.value
    images = sharpen(images, jnp.where(sharper, jnp.float32(enhance), jnp.float32(1)))
    amounts = signs * (magnitude / HIGHEST_MAGNITUDE)
    return warp(images, _matrices(operations, amounts, images.shape[1]))


def histograms(images: Images) -> Counts:
    """How many pixels of each image and channel have each value."""
    # A scatter per image avoids a one-hot array 256 times the size of the batch.
    bins = jax.vmap(lambda values: jnp.zeros(3 * 256, jnp.int32).at[values].add(1))
    return bins(_bins(images)).reshape(-1, 3, 256)


def auto_contrast_tables(counts: Counts) -> Tables:
    """Stretches the values that occur over 0..255 (PIL's autocontrast, no cutoff)."""
    low = jax.lax.argmax(counts > 0, 2, jnp.int32)[..., None]
    high = 255 - jax.lax.argmax(counts[..., ::-1] > 0, 2, jnp.int32)[..., None]
    values = jnp.arange(256, dtype=jnp.int32)
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def equalise_tables(counts: Counts) -> Tables:
    """Makes the values that occur about equally frequent (PIL's equalize)."""
    values = jnp.arange(256, dtype=jnp.int32)
    last = jnp.max(jnp.where(counts > 0, values, 0), axis=-1, keepdims=True)
    others = jnp.where(values == last, 0, counts)
    step = jnp.sum(others, axis=-1, keepdims=True, dtype=jnp.int32) // 255
    below = jnp.cumsum(counts, axis=-1, dtype=jnp.int32) - counts
    levelled = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(levelled, 255), values)


def look_up(images: Images, tables: Tables) -> Images:
    """Every value replaced by its entry in its image's and channel's table."""
    flat = tables.astype(jnp.uint8).reshape(len(tables), 3 * 256)
    return _take(flat, _bins(images)).reshape(images.shape)


def _bins(images: Images) -> Int32[Array, "batch values"]:
    bins = images.astype(jnp.int32) + 256 * jnp.arange(3, dtype=jnp.int32)
    return bins.reshape(len(images), -1)


def sharpen(images: Images, factors: Float32[Array, " batch"]) -> Images:
    """Moves each image away from its smoothed self; 1 is the image itself, 0 the smoothed one.

    PIL's kernel, 5 in the middle of eight ones; the outermost pixels stay as they are.
    """
    side = images.shape[1]
    values = images.astype(jnp.int32)
    padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = (box + 4 * values + 6) // 13  # rounded to the nearest; thirteenths have no halves
    place = jnp.arange(side, dtype=jnp.int32)
    inside = (place > 0) & (place < side - 1)
    smooth = jnp.where((inside[:, None] & inside)[..., None], smooth, values)
    # The product is the only rounding before the floor, so every compilation gives the same value.
    difference = (values - smooth).astype(jnp.float32)
    change = jnp.floor(factors[:, None, None, None] * difference).astype(jnp.int32)
    return jnp.clip(smooth + change, 0, 255).astype(jnp.uint8)


def warp(images: Images, matrices: Matrices) -> Images:
    """Each image warped by its matrix: bilinear, rounded; outside the source, pixels are FILL.

    The edge pixels of the source reach to its edge, as in PIL. Matrix entries are truncated to
    2^-16, weights rounded to 2^-8, and all else is exact: with float coordinates, two compilations
    could differ at a pixel border, and a sharded batch from the whole one.
    """
    batch, side = images.shape[:2]
    matrices = (matrices * 2**_ONE_BITS).astype(jnp.int32)[:, :, :, None, None]
    column = jnp.arange(side, dtype=jnp.int32)
    row = column[:, None]

    def share(position):  # the fraction, in steps of 1/256
        steps = position >> _ONE_BITS + 1 - _SHARE_BITS & (1 << _SHARE_BITS) - 1
        return steps.astype(jnp.float32)[..., None] / (1 << _SHARE_BITS)

    def source(a, b, c):  # a * (column + 1/2) + b * (row + 1/2) + c, counted in halves
        return a * (2 * column + 1) + b * (2 * row + 1) + 2 * c

    x, y = source(*jnp.moveaxis(matrices[:, 0], 1, 0)), source(*jnp.moveaxis(matrices[:, 1], 1, 0))
    end = side << _ONE_BITS + 1
    nearest = (1 << _ONE_BITS) - (1 << _ONE_BITS - _SHARE_BITS)  # half a pixel, less half a step
    inside = (x >= 0) & (x < end) & (y >= 0) & (y < end)
    x, y = x - nearest, y - nearest
    left, top = x >> _ONE_BITS + 1, y >> _ONE_BITS + 1
    right_share, low_share = share(x), share(y)

    # A pixel is packed into one 32-bit word, so that a neighbour takes one read instead of three.
    shifts = jnp.arange(0, 24, 8, dtype=jnp.uint32)
    words = (images.astype(jnp.uint32) << shifts).sum(axis=-1, dtype=jnp.uint32).reshape(batch, -1)

    def read(row, column):
        place = jnp.clip(row, 0, side - 1) * side + jnp.clip(column, 0, side - 1)
        pixels = _take(words, place.reshape(batch, -1)).reshape(batch, side, side, 1)
        return ((pixels >> shifts) & 255).astype(jnp.float32)

    def between(first, second, share):
        return first + share * (second - first)

    upper = between(read(top, left), read(top, left + 1), right_share)
    lower = between(read(top + 1, left), read(top + 1, left + 1), right_share)
    values = jnp.round(between(upper, lower, low_share))
    return jnp.where(inside[..., None], values, FILL).astype(jnp.uint8)


def _matrices(operations: Operations, amounts: Float32[Array, " batch"], side: int) -> Matrices:
    """Shears from the top left corner, translations, and anticlockwise turns about the centre."""

    def each(*entries: Array | float) -> Matrices:
        rows = [jnp.broadcast_to(jnp.float32(entry), amounts.shape) for entry in entries]
        return jnp.stack(rows, axis=-1).reshape(-1, 2, 3)

    shear, pixels = amounts * _SHEAR, amounts * _TRANSLATE * side
    angle, centre = jnp.deg2rad(amounts * _ROTATE_DEGREES), side / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    across, down = centre * (1 - cos + sin), centre * (1 - cos - sin)
    matrices = {
        Operation.SHEAR_X: each(1, shear, 0, 0, 1, 0),
        Operation.SHEAR_Y: each(1, 0, 0, shear, 1, 0),
        Operation.TRANSLATE_X: each(1, 0, pixels, 0, 1, 0),
        Operation.TRANSLATE_Y: each(1, 0, 0, 0, 1, pixels),
        Operation.ROTATE: each(cos, -sin, across, sin, cos, down),
    }
    return _choose(matrices, each(1, 0, 0, 0, 1, 0), operations)


def _choose(by_operation: dict[Operation, Rows], otherwise: Rows, operations: Operations) -> Rows:
    """Row i of the array that belongs to operation i, or of `otherwise` where there is none."""
    chosen = operations == jnp.array(list(by_operation), jnp.int32)[:, None]
    chosen = jnp.concatenate([chosen, ~chosen.any(axis=0, keepdims=True)]).astype(jnp.float32)
    rows = jnp.stack([*by_operation.values(), otherwise])
    # A product with a one-hot vector, exact in float32, instead of a select: XLA would fuse a
    # select's branches into the reads of `look_up` and `warp`, and recompute them for every pixel.
    exact = jnp.einsum("ob,ob...->b...", chosen, rows.astype(jnp.float32), precision="highest")
    return exact.astype(rows.dtype)


def _take(rows: Array, places: Int32[Array, "batch places"]) -> Array:
    """Entry `places[i, j]` of row i, which must exist; row by row, so nothing crosses devices."""
    return jax.vmap(lambda row, where: row.at[where].get(mode="promise_in_bounds"))(rows, places)
