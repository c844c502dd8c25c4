"""Augmentation on the device: mirroring, RandAugment without colour operations, normalisation.

Every image passes the three stages of a layer: a lookup table per channel, a 3x3 sharpening, an
affine warp. The drawn operation sets the parameters of its stage; the other stages get neutral
ones, which leave every bit unchanged.
So all ten operations cost one pass, and nothing couples two images: a batch-sharded mesh needs no
communication.

Ranges, fill and probability are those of ALBEF's public code (Li et al. 2021); pixel arithmetic is
PIL's, and as in both, every stage ends in uint8. Departures from ALBEF: translation scales with the
side; the outermost source pixel is not blended with the fill, and shear and rotation count from
pixel corners, not pixel centres (half a pixel at most).
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
_SHARE_BITS = (
    8  # of an interpolation weight: two weights and a pixel value fill the 24 bits of a float32
)


class Operation(enum.IntEnum):
    """The operations an image can draw, all equally often."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALISE = 2
    BRIGHTNESS = 3
    SHARPNESS = 4
    SHEAR_X = 5
    SHEAR_Y = 6
    TRANSLATE_X = 7
    TRANSLATE_Y = 8
    ROTATE = 9


def augment(
    images: UInt8[Array, "batch side side 3"],
    flip: Bool[Array, "batch"],
    key: PRNGKeyArray,
    *,
    layers: int,
    magnitude: int | float,
) -> Float32[Array, "batch side side 3"]:
    """The images, mirrored where `flip`, then changed by `layers` random operations each; values
    stay in 0..255.

    An image's operations depend on the key and its place in the global batch, not on where it is
    computed. RandAugment (Cubuk et al. 2020) with ALBEF's ranges; `magnitude` is 0..10, and ALBEF
    uses 7 in 2 layers.
    """
    images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
    if layers:
        operations, signs = draw(key, len(images), layers)
        for layer in range(layers):
            images = apply(images, operations[:, layer], signs[:, layer], magnitude=magnitude)
    return images.astype(jnp.float32)


def normalise(
    images: UInt8[Array, "batch side side 3"] | Float32[Array, "batch side side 3"],
    dtype: DTypeLike,
) -> Float[Array, "batch side side 3"]:
    """Pixels in 0..255 as the encoders expect them; computed in float32, since bfloat16 has no 256
    even steps.
    """
    images = images.astype(jnp.float32) / 255
    mean, std = jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32)
    return ((images - mean) / std).astype(dtype)


def draw(
    key: PRNGKeyArray, batch: int, layers: int
) -> tuple[Int32[Array, "batch layers"], Float32[Array, "batch layers"]]:
    """Each image's operations, with replacement, and their signs; an operation that is skipped
    counts as identity.
    """
    which, whether, sign = jax.random.split(key, 3)
    operations = jax.random.randint(which, (batch, layers), 0, len(Operation), jnp.int32)
    applied = jax.random.bernoulli(whether, jnp.float32(APPLY_PROBABILITY), (batch, layers))
    positive = jax.random.bernoulli(sign, jnp.float32(0.5), (batch, layers))
    signs = jnp.where(positive, jnp.float32(1), jnp.float32(-1))
    return jnp.where(applied, operations, Operation.IDENTITY.value), signs


def apply(
    images: UInt8[Array, "batch side side 3"],
    operations: Int32[Array, "batch"],
    signs: Float32[Array, "batch"],
    *,
    magnitude: int | float,
) -> UInt8[Array, "batch side side 3"]:
    """Each image after its own operation.

    The sign turns shears, translations and rotations only, as in ALBEF.
    """
    enhance = magnitude / HIGHEST_MAGNITUDE * _ENHANCE_SPAN + _ENHANCE_LEAST
    amount = signs * (magnitude / HIGHEST_MAGNITUDE)

    images = look_up(images, _tables(histograms(images), operations, enhance))
    sharper = operations == Operation.SHARPNESS.value
    images = sharpen(images, jnp.where(sharper, jnp.float32(enhance), jnp.float32(1)))
    return warp(images, _matrices(operations, amount, images.shape[1]))


# Tables: auto-contrast, equalise, brightness.


def histograms(images: UInt8[Array, "batch side side 3"]) -> Int32[Array, "batch 3 256"]:
    """How many pixels of each image and channel have each value."""
    # A scatter per image avoids a one-hot array 256 times the size of the batch.
    bins = jax.vmap(lambda values: jnp.zeros(3 * 256, jnp.int32).at[values].add(1))
    return bins(_bins(images)).reshape(-1, 3, 256)


def auto_contrast_tables(counts: Int32[Array, "batch 3 256"]) -> Int32[Array, "batch 3 256"]:
    """Stretches the values that occur over 0..255; a channel of one value stays (PIL's
    autocontrast, no cutoff).
    """
    first = lambda counts: jax.lax.argmax(counts > 0, counts.ndim - 1, jnp.int32)[..., None]  # noqa: E731
    low, high = first(counts), 255 - first(counts[..., ::-1])
    values = jnp.arange(256, dtype=jnp.int32)
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), values)


def equalise_tables(counts: Int32[Array, "batch 3 256"]) -> Int32[Array, "batch 3 256"]:
    """Makes the values that occur about equally frequent; a channel of one value stays (PIL's
    equalize).
    """
    values = jnp.arange(256, dtype=jnp.int32)
    last = jnp.max(jnp.where(counts > 0, values, 0), axis=-1, keepdims=True)
    others = jnp.where(values == last, 0, counts)
    step = jnp.sum(others, axis=-1, keepdims=True, dtype=jnp.int32) // 255
    below = jnp.cumsum(counts, axis=-1, dtype=jnp.int32) - counts
    levelled = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(levelled, 255), values)


def brightness_table(factor: float) -> Int32[Array, "256"]:
    """Multiplies every value by a factor; 1 is the image itself."""
    return jnp.clip(jnp.arange(256, dtype=jnp.float32) * factor, 0, 255).astype(jnp.int32)


def look_up(
    images: UInt8[Array, "batch side side 3"], tables: Int32[Array, "batch 3 256"]
) -> UInt8[Array, "batch side side 3"]:
    """Every value replaced by its entry in its image's and channel's table."""
    flat = tables.astype(jnp.uint8).reshape(len(tables), 3 * 256)
    return _take(flat, _bins(images)).reshape(images.shape)


def _tables(
    counts: Int32[Array, "batch 3 256"], operations: Int32[Array, "batch"], factor: float
) -> Int32[Array, "batch 3 256"]:
    unchanged = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), counts.shape)
    return _choose(
        {
            Operation.AUTO_CONTRAST: auto_contrast_tables(counts),
            Operation.EQUALISE: equalise_tables(counts),
            Operation.BRIGHTNESS: jnp.broadcast_to(brightness_table(factor), counts.shape),
        },
        unchanged,
        operations,
    )


def _bins(images: UInt8[Array, "batch side side 3"]) -> Int32[Array, "batch values"]:
    return (images.astype(jnp.int32) + 256 * jnp.arange(3, dtype=jnp.int32)).reshape(
        len(images), -1
    )


# Sharpness.


def sharpen(
    images: UInt8[Array, "batch side side 3"], factors: Float32[Array, "batch"]
) -> UInt8[Array, "batch side side 3"]:
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
    sharp = smooth + change
    return jnp.clip(sharp, 0, 255).astype(jnp.uint8)


# Warps: identity, shear, translate, rotate.


def warp(
    images: UInt8[Array, "batch side side 3"], matrices: Float32[Array, "batch 2 3"]
) -> UInt8[Array, "batch side side 3"]:
    """Each image warped by its matrix, which maps output (x, y, 1), in pixels from the corner, to
    source (x, y).

    Bilinear, rounded; pixels from outside the source are FILL. Its edge pixels reach to the edge,
    as in PIL. Matrix entries are truncated to 2^-16, weights rounded to 2^-8, and all else is
    exact: with float coordinates, two compilations could land on different sides of a pixel border,
    and a sharded batch would differ from the whole one.
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


def shear_matrix(x: Float32[Array, ""], y: Float32[Array, ""]) -> Float32[Array, "2 3"]:
    """Reads x times the row further right and y times the column further down, from the top left
    corner.
    """
    return jnp.array([[1, x, 0], [y, 1, 0]], jnp.float32)


def translate_matrix(x: Float32[Array, ""], y: Float32[Array, ""]) -> Float32[Array, "2 3"]:
    """Reads x pixels further right and y pixels further down."""
    return jnp.array([[1, 0, x], [0, 1, y]], jnp.float32)


def rotate_matrix(degrees: Float32[Array, ""], side: int) -> Float32[Array, "2 3"]:
    """Turns the image anticlockwise about its centre."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    centre = side / 2
    return jnp.array(
        [[cos, -sin, centre * (1 - cos + sin)], [sin, cos, centre * (1 - cos - sin)]], jnp.float32
    )


def _matrices(
    operations: Int32[Array, "batch"], amounts: Float32[Array, "batch"], side: int
) -> Float32[Array, "batch 2 3"]:
    none, shear, pixels = jnp.zeros_like(amounts), amounts * _SHEAR, amounts * _TRANSLATE * side
    return _choose(
        {
            Operation.SHEAR_X: jax.vmap(shear_matrix)(shear, none),
            Operation.SHEAR_Y: jax.vmap(shear_matrix)(none, shear),
            Operation.TRANSLATE_X: jax.vmap(translate_matrix)(pixels, none),
            Operation.TRANSLATE_Y: jax.vmap(translate_matrix)(none, pixels),
            Operation.ROTATE: jax.vmap(rotate_matrix, (0, None))(amounts * _ROTATE_DEGREES, side),
        },
        jnp.broadcast_to(jnp.eye(2, 3, dtype=jnp.float32), (len(amounts), 2, 3)),
        operations,
    )


def _choose(
    by_operation: dict[Operation, Shaped[Array, "batch ..."]],
    otherwise: Shaped[Array, "batch ..."],
    operations: Int32[Array, "batch"],
) -> Shaped[Array, "batch ..."]:
    """Row i of the array that belongs to operation i, or of `otherwise` where there is none."""
    chosen = operations == jnp.array(list(by_operation), jnp.int32)[:, None]
    chosen = jnp.concatenate([chosen, ~chosen.any(axis=0, keepdims=True)]).astype(jnp.float32)
    rows = jnp.stack([*by_operation.values(), otherwise])
    # A product with a one-hot vector, exact in float32, instead of a select: XLA would fuse a
    # select's branches into the reads of `look_up` and `warp`, and recompute them for every pixel.
    exact = jnp.einsum("ob,ob...->b...", chosen, rows.astype(jnp.float32), precision="highest")
    return exact.astype(rows.dtype)


def _take(rows: Array, places: Int32[Array, "batch places"]) -> Array:
    """Entry `places[i, j]` of row i, which must exist (unchecked); row by row, so nothing crosses
    devices.
    """
    return jax.vmap(lambda row, where: row.at[where].get(mode="promise_in_bounds"))(rows, places)
