"""Decoding and cropping, on files of the real formats made on the spot."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from codebook_jax.data.images import Picture, UnreadableImage, decode, resize_square, rgb

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
    "case",
    "RGB.JPEG RGB.PNG RGB.WEBP RGB.BMP CMYK.JPEG P.PNG P.GIF RGBA.PNG CMYK.TIFF YCbCr.JPEG".split(),
)
def test_colours_survive_every_format(case, tmp_path):
    mode, kind = case.split(".")
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
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(1, (4, 0, 8, 8))
    hidden = Image.new("RGB", (8, 8), (1, 2, 3))
    hidden.paste(RED, (4, 0, 8, 8))
    for file in (
        saved(Image.fromarray(rgba), "PNG"),
        saved(palette, "PNG", transparency=0),
        saved(palette, "GIF", transparency=0),
        saved(hidden, "PNG", transparency=(1, 2, 3)),
    ):
        image = decode(file)
        assert near(image[4, 1], (255, 255, 255), 2) and near(image[4, 6], RED, 2)
    half = rgba.copy()
    half[:, :, 3] = 128
    expected = 255 - (255 - np.array(RED)) * 128 / 255
    assert near(decode(saved(Image.fromarray(half), "PNG"))[4, 6], expected, 2)


def test_a_colour_with_alpha_in_any_of_pillows_modes_is_shown_on_white():
    for mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((90, 90, 90, 255), (4, 0, 8, 8))
        image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
        shown = np.asarray(rgb(image))
        assert (shown[:, :4] == 255).all() and (shown[:, 4:] == 90).all(), mode


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.arange(256, dtype=np.uint8), "PNG"),
        (np.arange(0, 65536, 257, dtype=np.uint16), "PNG"),
        (np.arange(0, 65536, 257, dtype=np.uint16), "TIFF"),
        (np.arange(0, 65536, 257, dtype=np.int32), "TIFF"),
        (np.arange(256, dtype=np.int32), "TIFF"),
        (np.linspace(0, 1, 256, dtype=np.float32), "TIFF"),
    ],
)
def test_greys_of_every_depth_keep_their_lightness(values, kind):
    image = Image.fromarray(values[None].repeat(2, 0))
    np.testing.assert_array_equal(decode(saved(image, kind))[1, :, 2], range(256))
    if kind == "TIFF" and values.dtype != np.int32:  # Pillow opens no negatives of these
        negative = saved(image, kind, tiffinfo={262: 0})
        np.testing.assert_array_equal(decode(negative)[0, :, 0], range(255, -1, -1))


@pytest.mark.parametrize("wrong", [-0.5, 1.5, 255.0, np.nan, np.inf, -1, 65536, 2**30])
def test_deep_greys_of_another_range_are_unreadable(wrong, tmp_path):
    kind = np.float32 if isinstance(wrong, float) else np.int32
    values = np.array([[0, wrong]], kind)
    (tmp_path / "deep.tiff").write_bytes(saved(Image.fromarray(values), "TIFF"))
    said = rf"deep\.tiff: .*{re.escape(format(wrong, 'g'))}.* 0 to \d+$"
    with pytest.raises(UnreadableImage, match=said):
        decode(tmp_path / "deep.tiff")


def test_the_first_frame_of_an_animation_is_the_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        file = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert near(decode(file)[4, 4], RED)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "SGI"])
def test_formats_that_photographs_do_not_have_are_not_opened(kind):
    with pytest.raises(UnreadableImage, match="not a picture .*JPEG, PNG"):
        decode(saved(Image.new("RGB", (32, 32), RED), kind))


def test_what_cannot_be_read_is_said_in_one_sentence_with_its_path(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    jpeg, png = (saved(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    cases = {
        "empty.jpg": (b"", "the file is empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "header.jpg": (jpeg[:20], "not a picture|truncated|broken"),
        "page.jpg": (b"<html>403 Forbidden</html>", "not a picture"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for wrong, reason in (
        (tmp_path / "gone.jpg", r"gone\.jpg: .*file"),
        (tmp_path, "directory"),
        ("a\0b.jpg", "null"),
        (b"", "0 bytes"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            decode(wrong)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(UnreadableImage, match="over the limit of 4,095"):
        decode(png)


def test_a_broken_exif_block_does_not_cost_the_picture():
    file = saved(halves(), "JPEG", exif=b"Exif\0\0broken")
    assert near(decode(file)[15, 5], RED)


def test_resizing_keeps_the_whole_picture_and_leaves_the_right_size_alone():
    image = np.asarray(halves(size=(90, 30)))
    square = resize_square(image, 24)
    assert square.shape == (24, 24, 3) and near(square[12, 2], RED) and near(square[12, 21], BLUE)
    assert resize_square(square, 24) is square


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"exif": b"Exif\0\0broken"}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_pixels_that_pillow_reads_and_its_size_before_them(mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((104, 80)).convert(mode)
    content = saved(image, "JPEG", **options)
    picture = Picture(content)
    assert (picture.height, picture.width) == (80, 104) and picture.shrinks == (1, 2, 4, 8)
    whole = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(picture.pixels(), whole)
    for shrink in (2, 4, 8):
        small = picture.pixels(shrink)
        assert small.shape == (80 // shrink, 104 // shrink, 3)
        mean = np.asarray(Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BOX))
        assert np.abs(mean.astype(int) - small).mean() < 3
        odd = Picture(saved(image.crop((0, 0, 101, 75)), "JPEG", **options)).pixels(shrink)
        assert odd.shape == (-(-75 // shrink), -(-101 // shrink), 3)


def test_a_damaged_jpeg_is_judged_by_pillow_in_every_size():
    content = saved(halves(size=(400, 300)), "JPEG")
    for shrink in (1, 4):
        with pytest.raises(UnreadableImage, match="truncated"):
            Picture(content[: len(content) * 2 // 3]).pixels(shrink)
    zeros = bytearray(content)
    zeros[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    whole = np.asarray(Image.open(io.BytesIO(zeros)).convert("RGB"))  # Pillow reads over it
    np.testing.assert_array_equal(Picture(bytes(zeros)).pixels(), whole)
    assert Picture(bytes(zeros)).pixels(4).shape == (75, 100, 3)


def png(rows, depth, colour_type, transparent):
    """A PNG of these rows of packed bytes, with one transparent colour."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    width = len(rows[0]) * 8 // (depth * (3 if colour_type == 2 else 1))
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
    ]
    parts += [
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "colour_type", "hidden", "shown", "expected"),
    [
        (16, 0, [0x1234], [0x9C40], 156),
        (16, 0, [0], [0xFFFF], 255),
        (16, 2, [0x1234, 0, 0x4321], [0x8080] * 3, 128),
        (16, 2, [1, 2, 3], [0x8080] * 3, 128),
        (16, 2, [0, 0, 0], [0x8080] * 3, 128),
        (8, 0, [7], [90], 90),
        (8, 2, [7, 8, 9], [90] * 3, 90),
        (4, 0, [3], [9], 153),
        (2, 0, [1], [2], 170),
        (1, 0, [1], [0], 0),
    ],
)
def test_the_one_transparent_colour_of_a_png_is_white(depth, colour_type, hidden, shown, expected):
    bits = "".join(f"{value:0{depth}b}" for value in hidden * 8 + shown * 8)
    row = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    file = png([row] * 3, depth, colour_type, hidden)
    for image in (decode(file), np.asarray(rgb(Image.open(io.BytesIO(file))))):
        assert (image[:, :8] == 255).all() and (image[:, 8:] == expected).all()
