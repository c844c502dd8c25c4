"""Decoding and cropping, on files of the real formats made on the spot."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from codebook_jax.data.images import UnreadableImage, crop_box, decode, random_crop, resize_square

RED, BLUE = (220, 30, 30), (30, 30, 220)


def halves(mode="RGB", size=(40, 30)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel, colour, tolerance=40):
    return np.abs(pixel.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("RGB", "PNG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
    ],
)
def test_colours_survive_every_format(mode, kind, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(saved(halves(mode), kind))
    for source in (path, str(path), path.read_bytes()):
        image = decode(source)
        assert image.dtype == np.uint8 and image.shape == (30, 40, 3)
        assert near(image[15, 5], RED) and near(image[15, 35], BLUE)


def test_an_array_is_returned_as_it_is_and_another_shape_refused():
    image = np.asarray(halves())
    assert decode(image) is image
    for wrong in (image[..., 0], image.astype(np.float32), np.zeros((3, 5, 4), np.uint8)):
        with pytest.raises(UnreadableImage, match="not uint8"):
            decode(wrong)


@pytest.mark.parametrize("rotation", range(1, 9))
def test_exif_rotation_is_applied(rotation):
    upright = halves()
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[undo[rotation]]) if rotation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = rotation
    image = decode(saved(stored, "JPEG", exif=exif))
    assert image.shape == (30, 40, 3) and near(image[15, 5], RED) and near(image[15, 35], BLUE)


def test_transparency_is_white_in_every_form():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (*RED, 255)
    half = rgba.copy()
    half[:, :, 3] = 128
    grey = Image.fromarray(rgba).convert("LA")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(1, (4, 0, 8, 8))
    hidden = Image.new("RGB", (8, 8), (1, 2, 3))
    hidden.paste(RED, (4, 0, 8, 8))
    files = [
        saved(Image.fromarray(rgba), "PNG"),
        saved(palette, "PNG", transparency=0),
        saved(palette, "GIF", transparency=0),
        saved(hidden, "PNG", transparency=(1, 2, 3)),
    ]
    for file in files:
        image = decode(file)
        assert near(image[4, 1], (255, 255, 255), 2) and near(image[4, 6], RED, 2)
    assert near(decode(saved(grey, "PNG"))[4, 1], (255, 255, 255), 2)
    expected = 255 - (255 - np.array(RED)) * 128 / 255
    assert near(decode(saved(Image.fromarray(half), "PNG"))[4, 6], expected, 2)


def test_grey_of_one_eight_and_sixteen_bits_keeps_its_lightness():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF"):
        image = decode(saved(Image.fromarray(ramp), kind))
        assert image.shape == (4, 256, 3)
        np.testing.assert_allclose(image[0, :, 1], np.arange(256), atol=1)
    eight = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(decode(saved(Image.fromarray(eight), "PNG"))[0, :, 2], eight[0])
    one = Image.new("1", (4, 4), 1)
    assert decode(saved(one, "PNG")).min() == 255


def test_what_cannot_be_read_is_said_in_one_sentence_with_its_path(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = saved(Image.fromarray(noise), "JPEG")
    png = saved(Image.fromarray(noise), "PNG")
    cases = {
        "empty.jpg": (b"", "the file is empty"),
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "header.jpg": (whole[:20], "not a picture|truncated|broken"),
        "page.jpg": (b"<html>403 Forbidden</html>", "not a picture"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: there is no such file"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(UnreadableImage, match="folder"):
        decode(tmp_path)
    with pytest.raises(UnreadableImage):
        decode("a\0b.jpg")
    with pytest.raises(UnreadableImage, match="0 bytes"):
        decode(b"")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(UnreadableImage, match="over the limit of 4,095"):
        decode(png)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="limit"):
        decode(png)


def test_a_broken_exif_block_does_not_cost_the_picture():
    file = saved(halves(), "JPEG", exif=b"Exif\0\0broken")
    assert near(decode(file)[15, 5], RED)


def test_resizing_keeps_the_whole_picture_and_leaves_the_right_size_alone():
    image = np.asarray(halves(size=(90, 30)))
    square = resize_square(image, 24)
    assert square.shape == (24, 24, 3) and near(square[12, 2], RED) and near(square[12, 21], BLUE)
    assert resize_square(square, 24) is square


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


def test_the_same_draws_give_the_same_crop_and_no_pixel_of_outside():
    image = np.zeros((60, 60, 3), np.uint8)
    image[:, 30:] = 255

    def crop(seed):
        rng = np.random.default_rng(seed)
        return random_crop(image, rng, scale=(0.1, 0.2), ratio=(1, 1), size_px=17)

    np.testing.assert_array_equal(crop(3), crop(3))
    crops = [crop(seed) for seed in range(60)]
    assert all(one.shape == (17, 17, 3) for one in crops)
    assert any(one.max() == 0 for one in crops) and any(one.min() == 255 for one in crops)
    whole = random_crop(image, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1), size_px=60)
    np.testing.assert_array_equal(whole, image)
