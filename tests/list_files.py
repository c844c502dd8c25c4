"""What the tests of sources share: to write one, to open it, and the refusal of one."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from codebook_jax.data.sources import open_source
from codebook_jax.errors import UserError


def open_it(spec, role="train", **changes):
    return open_source(spec, role=role, **dict(size_px=32, scenes_examples=50, seed=0) | changes)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def picture(number, form="jpeg"):
    """The bytes of a picture file, different for each number."""
    pixels = np.full((20, 30, 3), number % 251, np.uint8)
    pixels[:, :, 1] = np.arange(30) * 8
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def records(source):
    return [source[index] for index in range(len(source))]


def captions(source):
    return [source.captions(index) for index in range(len(source))]


def ids(source):
    return [record.image_id for record in records(source)]


def below(folder, source):
    """The paths of the source's images as they are below a folder."""
    return [record.image.removeprefix(f"{folder}/") for record in records(source)]


def check_source(source):
    """What holds for every source: it crosses to another process and ends where it ends."""
    other = pickle.loads(pickle.dumps(source))
    assert other.fingerprint() == source.fingerprint()
    assert repr(other) == repr(source) and "0x" not in repr(source)
    np.testing.assert_equal(other[1], source[1])
    assert other.name(1) == source.name(1) and source.captions(1) == source[1].captions
    for index in (-1, len(source)):
        for read in (source.__getitem__, source.captions, source.name):
            with pytest.raises(IndexError):
                read(index)


def refusal(spec, role="train", **changes):
    """The sentence that refuses a source: one line."""
    with pytest.raises(UserError) as raised:
        open_it(spec, role, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)
