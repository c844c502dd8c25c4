"""Weight files made on the spot, and the refusals of those that cannot be read."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from codebook_jax.errors import UserError
from codebook_jax.weights.files import read_weights

FILES = Path(__file__).parent / "goldens" / "files"  # written by torch itself: make_weight_files.py
WHAT = "config.init names image:it"
SAVED = ("checkpoint_zip.pth", "checkpoint_stream.pth")
SMALL = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.steps": np.array(7)}


def read(spec):
    return read_weights(str(spec), WHAT)


def refusal(spec):
    """The sentence with which reading `spec` is refused."""
    with pytest.raises(UserError) as refused:
        read(spec)
    sentence = str(refused.value)
    assert sentence.startswith(f"{WHAT}, but ") and "\n" not in sentence, sentence
    return sentence


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def write_safetensors(path, tensors):
    """`tensors`: name -> (type, shape, bytes)."""
    header, numbers = {}, b""
    for name, (kind, shape, content) in tensors.items():
        places = [len(numbers), len(numbers) + len(content)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": places}
        numbers += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path
