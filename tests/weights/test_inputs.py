"""The images and texts that a user may pass, in every container; each picture has one colour."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codebook_jax.errors import UserError
from codebook_jax.weights.inputs import picture_list, pixels_of, text_list


@pytest.fixture
def paths(tmp_path):
    """Two pictures, of greys 10 and 20."""
    for grey in (10, 20):
        Image.new("L", (6, 4), grey).save(tmp_path / f"{grey}.png")
    return [str(tmp_path / f"{grey}.png") for grey in (10, 20)]


def greys(images):
    pictures = enumerate(picture_list(images))
    return [int(pixels_of(picture, position).mean()) for position, picture in pictures]


@pytest.mark.parametrize(
    "given",
    [
        lambda paths: paths,
        tuple,
        iter,
        lambda paths: (Path(path) for path in paths),
        lambda paths: dict.fromkeys(paths).keys(),
        np.array,
        lambda paths: np.array(paths, object),
        lambda paths: np.array([Path(path) for path in paths]),
        lambda paths: [open(path, "rb") for path in paths],
        lambda paths: [io.BytesIO(Path(path).read_bytes()) for path in paths],
        lambda paths: [bytearray(Path(path).read_bytes()) for path in paths],
        lambda paths: np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_pictures_may_be_in_any_container(paths, given):
    assert greys(given(paths)) == [10, 20]


def test_one_picture_needs_no_container(paths, tmp_path, monkeypatch):
    content = Path(paths[0]).read_bytes()
    written = io.BytesIO()
    Image.new("L", (6, 4), 10).save(written, "PNG")  # and stands at its end
    monkeypatch.setenv("HOME", str(tmp_path))
    ones = [paths[0], Path(paths[0]), np.str_(paths[0]), "~/10.png"]
    ones += [content, memoryview(content), written, Image.open(paths[0])]
    with open(paths[0], "rb") as file:
        assert [greys(one) for one in (*ones, file)] == [[10]] * 9
        assert greys([file, file]) == [10, 10]


def test_files_may_be_closed_once_they_were_given(paths):
    def opened():
        for path in paths:
            with open(path, "rb") as file:
                yield file

    assert greys(opened()) == [10, 20]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_neither_is_refused_in_a_sentence(paths):
    closed = io.BytesIO(b"x")
    closed.close()
    for given, words in (
        (None, "images=None cannot be read"),
        ({"a": paths[0]}, "images={.*a list"),
        (set(paths), "images={.*a list"),
        ([paths], "image 0 is a list"),
        ([paths[0], io.StringIO("x")], 'image 1 .*"rb"'),
        (Path(paths[0]).open(), 'image 0 .*"rb"'),
        ([closed], "image 0 cannot be read .*closed"),
        ("", "image 0: .*empty"),
        (io.BytesIO(), "image 0: 0 bytes: the file is empty"),
        (np.array(["none.png"]), "image 0: none.png: .*file"),
    ):
        with pytest.raises(UserError, match=words):
            greys(given)


def test_texts_may_be_in_any_container_that_has_an_order():
    two = ["a", "b"]
    for given in (two, tuple(two), iter("ab"), np.array(two), np.array(two, object)):
        assert text_list(given) == two
    assert text_list("a b") == ["a b"]
    for given in (None, 3, {"a": 1}, {"a"}):
        with pytest.raises(UserError, match="texts=.* a list of strings"):
            text_list(given)
    with pytest.raises(UserError, match="text 1 is a bytes"):
        text_list(["a", b"b"])


def test_a_picture_without_pixels_is_refused_with_its_position():
    with pytest.raises(UserError, match="image 3: it has no pixels"):
        pixels_of(np.zeros((0, 5, 3), np.uint8), 3)
