"""Random crops: the boxes drawn, and the resulting pixels."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from codebook_jax.data.crops import crop_box, random_crops, resize
from codebook_jax.data.images import Picture


def texture(height, width, seed=0):
    """Noise of every scale, as in photographs."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for scale in (64, 16, 4, 1):
        shape = max(1, height // scale), max(1, width // scale), 3
        small = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) * scale**0.5
    return (255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)


def crops(picture, seed, size, scale):
    """Two random squares of the picture."""
    out = np.empty((2, size, size, 3), np.uint8)
    random_crops(picture, np.random.default_rng(seed), out, scale=scale, ratio=(1, 1))
    return out


def resized(part):
    out = np.empty((64, 64, 3), np.uint8)
    resize(part, out)
    return out


def test_crops_keep_the_area_and_ratio_that_were_asked_for():
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(3000):
        left, top, right, bottom = crop_box(480, 640, rng, scale=(0.2, 0.9), ratio=(0.75, 4 / 3))
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        areas.append((right - left) * (bottom - top) / (480 * 640))
        ratios.append(math.log((right - left) / (bottom - top)))
    assert 0.19 < min(areas) < 0.22 and 0.85 < max(areas) < 0.91
    assert abs(min(ratios) - math.log(0.75)) < 0.02 and abs(max(ratios) - math.log(4 / 3)) < 0.02


def test_a_picture_too_long_for_the_ratio_gives_its_middle():
    rng = np.random.default_rng(0)
    bounds = dict(scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    assert crop_box(30, 400, rng, **bounds) == (180, 0, 220, 30)
    assert crop_box(400, 30, rng, **bounds) == (0, 180, 30, 220)
    assert crop_box(1, 1, rng, **bounds) == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [(427, 640), (640, 360), (30, 400)])
def test_at_a_scale_of_one_nothing_is_lost(size):
    whole = crop_box(*size, np.random.default_rng(0), scale=(1.0, 1.0), ratio=(0.75, 4 / 3))
    assert whole == (0, 0, size[1], size[0])


def test_the_same_draws_give_the_same_crop_and_no_pixel_of_outside():
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, 30:] = 255
    first, *others = (crops(Picture(image), seed, 17, (0.1, 0.2)) for seed in range(60))
    np.testing.assert_array_equal(first, crops(Picture(image), 0, 17, (0.1, 0.2)))
    assert any(one.max() == 0 for one in others) and any(one.min() == 255 for one in others)
    np.testing.assert_array_equal(crops(Picture(image), 0, 60, (1, 1))[0], image)


@pytest.mark.parametrize("side", [80, 110, 127, 140, 300])
def test_a_smaller_picture_is_as_near_to_pillows_bicubic_as_pillows_own_bilinear_is(side):
    part, size = texture(side, side + 9), (64, 64)
    expected = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BICUBIC)).astype(int)
    bilinear = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR)).astype(int)
    made = resized(part).astype(int)
    assert np.abs(made - expected).mean() <= np.abs(bilinear - expected).mean()


def test_a_larger_picture_is_pillows_bicubic():
    part = texture(40, 31)
    expected = np.asarray(Image.fromarray(part).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resized(part), expected)


@pytest.mark.parametrize(("side", "shrink"), [(127, 1), (128, 2), (300, 4), (600, 8)])
def test_crops_of_a_jpeg_are_those_of_its_pixels_and_decoded_no_larger_than_they_need(
    side, shrink, monkeypatch
):
    buffer = io.BytesIO()
    Image.fromarray(texture(side, side)).save(buffer, "JPEG", quality=95)
    asked = []
    pixels = Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self, by=1: asked.append(by) or pixels(self, by))
    whole = Picture(np.asarray(Image.open(buffer)))
    for seed in range(5):
        drawn = crops(whole, seed, 64, (0.99, 1.0))
        made = crops(Picture(buffer.getvalue()), seed, 64, (0.99, 1.0))
        for one, other in zip(drawn, made, strict=True):
            assert np.abs(one.astype(int) - other).mean() < 4
    assert set(asked[1::2]) <= {shrink, max(1, shrink // 2)}
