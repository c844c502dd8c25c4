"""Augmentation against PIL, and what sharding may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from codebook_jax.data.augment import (
    APPLY_PROBABILITY,
    FILL,
    MEAN,
    STD,
    Operation,
    apply,
    augment,
    draw,
    equalise_tables,
    histograms,
    normalise,
    warp,
)

SIDE = 61
MAGNITUDE = 7.0

_apply = jax.jit(apply, static_argnames="magnitude")
_augment = jax.jit(augment, static_argnames=("layers", "magnitude"))
_draw = jax.jit(draw, static_argnums=(1, 2))
_histograms, _warp = jax.jit(histograms), jax.jit(warp)


def _pictures(count=5, side=SIDE):
    """Gradients, a disc, a bar and noise; the last is dark and of few values, so that tables have
    gaps.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    pictures = []
    for _ in range(count):
        slopes = rng.normal(size=(2, 3))
        picture = 120 + 60 * (x[..., None] * slopes[0] + y[..., None] * slopes[1])
        cx, cy, radius = rng.uniform(0.2, 0.8, 3)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < (radius / 2) ** 2] = rng.uniform(0, 255, 3)
        picture[int(cx * side) : int(cx * side) + 7] = rng.uniform(0, 255, 3)
        pictures.append(picture + rng.normal(size=picture.shape) * 8)
    pictures[-1] = pictures[-1] // 16
    return np.clip(pictures, 0, 255).astype(np.uint8)


def _in_pil(picture, operation, sign, magnitude=MAGNITUDE):
    """PIL's version of the operation, with ALBEF's ranges written out independently."""
    amount, enhance = sign * magnitude / 10, 0.1 + 1.8 * magnitude / 10
    pixels, whole = amount * 10 * len(picture) / 256, Image.fromarray(picture)
    matrices = {
        "SHEAR_X": (1, 0.3 * amount, 0, 0, 1, 0),
        "SHEAR_Y": (1, 0, 0, 0.3 * amount, 1, 0),
        "TRANSLATE_X": (1, 0, pixels, 0, 1, 0),
        "TRANSLATE_Y": (1, 0, 0, 0, 1, pixels),
    }
    if operation.name in matrices:
        return _warped_in_pil(picture, matrices[operation.name]).astype(int)
    others = {
        "IDENTITY": lambda: whole,
        "AUTO_CONTRAST": lambda: ImageOps.autocontrast(whole),
        "EQUALISE": lambda: ImageOps.equalize(whole),
        "BRIGHTNESS": lambda: ImageEnhance.Brightness(whole).enhance(enhance),
        "SHARPNESS": lambda: ImageEnhance.Sharpness(whole).enhance(enhance),
        "ROTATE": lambda: whole.rotate(
            30 * amount, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3
        ),
    }
    return np.asarray(others[operation.name]()).astype(int)


def _warped_in_pil(picture, matrix):
    """In float, then rounded as OpenCV and we do: PIL cuts the fraction of uint8 images off."""
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    channels = [
        Image.fromarray(channel.astype(np.float32)).transform(
            channel.shape, affine, matrix, bilinear, fillcolor=FILL
        )
        for channel in np.moveaxis(picture, -1, 0)
    ]
    return np.rint(np.stack(channels, axis=-1))


def _applied(pictures, operation, sign, magnitude=MAGNITUDE):
    operations = np.full(len(pictures), operation, np.int32)
    signs = np.full(len(pictures), sign, np.float32)
    return np.asarray(_apply(pictures, operations, signs, magnitude=magnitude)).astype(int)


@pytest.mark.parametrize(("sign", "magnitude"), [(1, 7), (-1, 7), (-1, 0), (1, 3), (-1, 10)])
@pytest.mark.parametrize("operation", list(Operation))
def test_operation_is_that_of_pil(operation, sign, magnitude):
    pictures = _pictures()
    ours = _applied(pictures, operation, sign, magnitude)
    theirs = np.stack([_in_pil(picture, operation, sign, magnitude) for picture in pictures])
    difference = abs(ours - theirs)
    if operation != Operation.IDENTITY and magnitude == 7:
        assert (theirs != pictures).mean() > 0.1, "the pictures do not show this operation"
    assert difference.max() <= (2 if operation >= Operation.SHEAR_X else 1)
    assert difference.mean() <= {
        Operation.AUTO_CONTRAST: 0.006,  # PIL truncates 254.999999 to 254
        Operation.ROTATE: 0.5,  # PIL rotates uint8 images alone, and cuts the fraction off
    }.get(operation, 0.1 if operation >= Operation.SHEAR_X else 0)


def test_any_affine_warp_is_that_of_pil():
    pictures = _pictures()
    matrices = np.random.default_rng(1).normal(size=(5, 2, 3)) * [0.3, 0.3, 5] + np.eye(2, 3)
    ours = _warp(jnp.array(pictures), jnp.array(matrices, jnp.float32))
    theirs = np.stack(
        [_warped_in_pil(picture, m.ravel()) for picture, m in zip(pictures, matrices, strict=True)]
    )
    assert 0.05 < (theirs == FILL).mean() < 0.9
    difference = abs(np.asarray(ours) - theirs)
    assert difference.mean() < 0.1
    assert (difference > 2).mean() < 1e-3  # a source position on the edge itself


def test_equalise_of_a_small_image_stays_in_range_as_in_pil():
    """A step of one pixel would count beyond 255."""
    pictures = np.random.default_rng(2).integers(0, 256, (5, 19, 19, 3), dtype=np.uint8)
    tables = np.asarray(jax.jit(equalise_tables)(_histograms(pictures)))
    assert tables.min() >= 0 and tables.max() == 255
    for table, picture in zip(tables, pictures, strict=True):
        ours = np.stack([table[channel][picture[..., channel]] for channel in range(3)], axis=-1)
        np.testing.assert_array_equal(ours, ImageOps.equalize(Image.fromarray(picture)))


@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("value", [0, FILL, 255])
def test_constant_image_is_handled_as_in_pil(operation, value):
    pictures = np.full((1, 7, 7, 3), value, np.uint8)
    ours = _applied(pictures, operation, 1)[0]
    assert abs(ours - _in_pil(pictures[0], operation, 1)).max() <= 1


def test_image_changes_by_its_own_operation_whatever_the_others_draw():
    pictures = np.repeat(_pictures()[:1], len(Operation), axis=0)
    operations = np.random.default_rng(3).permutation(len(Operation)).astype(np.int32)
    together = _apply(
        pictures, operations, np.ones(len(Operation), np.float32), magnitude=MAGNITUDE
    )
    for mine, operation in zip(together, operations, strict=True):
        np.testing.assert_array_equal(mine, _applied(_pictures(), operation, 1)[0])


def test_without_layers_only_the_flip_remains():
    pictures, flip = _pictures(), np.array([True, False, True, True, False])
    out = _augment(jnp.array(pictures), jnp.array(flip), jax.random.key(0), layers=0, magnitude=7)
    assert out.dtype == jnp.float32
    for mine, picture, mirrored in zip(out, pictures, flip, strict=True):
        np.testing.assert_array_equal(mine, picture[:, ::-1] if mirrored else picture)


def test_layers_are_the_drawn_operations_one_after_another_on_the_flipped_image():
    pictures, flip, key = _pictures(32, 37), np.arange(32) % 3 == 0, jax.random.key(1)
    expected = np.where(flip[:, None, None, None], pictures[:, :, ::-1], pictures)
    operations, signs = _draw(key, 32, 2)
    assert (operations != Operation.IDENTITY).all(axis=1).any()
    for operation, sign in zip(operations.T, signs.T, strict=True):
        expected = _apply(expected, operation, sign, magnitude=MAGNITUDE)
    out = _augment(pictures, flip, key, layers=2, magnitude=MAGNITUDE)
    np.testing.assert_array_equal(out, expected)


def test_operations_and_signs_are_drawn_equally_often():
    operations, signs = (np.asarray(x).ravel() for x in _draw(jax.random.key(0), 20011, 2))
    share = np.bincount(operations, minlength=len(Operation)) / len(operations)
    each = APPLY_PROBABILITY / len(Operation)
    skipped = 1 - APPLY_PROBABILITY
    spread = 4 * np.sqrt(each / len(operations))
    np.testing.assert_allclose(share[1:], each, atol=spread)
    np.testing.assert_allclose(share[0], skipped + each, atol=4 * spread)
    assert set(signs) == {-1, 1}
    for operation in Operation:
        assert abs(signs[operations == operation].mean()) < 0.1


def test_draw_of_an_image_depends_on_its_place_and_key_alone():
    many, few = _draw(jax.random.key(7), 20011, 2), _draw(jax.random.key(7), 32, 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:32], b), many, few)
    assert (_draw(jax.random.key(8), 32, 2)[0] != few[0]).any()


def test_sharded_batch_is_the_whole_batch_and_nothing_crosses_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    pictures, flip = _pictures(32, 37), np.arange(32) % 3 == 0
    alone = _augment(pictures, flip, jax.random.key(1), layers=2, magnitude=MAGNITUDE)

    sharded = jax.device_put(pictures, rows), jax.device_put(flip, rows)
    compiled = _augment.lower(*sharded, jax.random.key(1), layers=2, magnitude=MAGNITUDE).compile()
    together = compiled(*sharded, jax.random.key(1))
    assert together.sharding.is_equivalent_to(rows, 4)
    np.testing.assert_array_equal(together, alone)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


def test_normalise_is_the_encoders_scale():
    pictures = _pictures()
    out = normalise(jnp.array(pictures, jnp.float32), jnp.float32)
    expected = (pictures.astype(np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert normalise(jnp.array(pictures, jnp.float32), jnp.bfloat16).dtype == jnp.bfloat16
