"""Weight files made on the spot: in both formats of torch.save without torch, and in
safetensors.
"""

import collections
import contextlib
import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from codebook_jax.errors import UserError
from codebook_jax.weights.files import read_weights

FILES = Path(__file__).parent / "goldens" / "files"  # written by torch itself: make_weight_files.py
WHAT = "config.init names image:it"
SAVED = ("checkpoint_zip.pth", "checkpoint_stream.pth")
SMALL = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.steps": np.array(7)}


def refusal(spec):
    """The sentence with which reading `spec` is refused; checks its beginning and that it is one
    line.
    """
    with pytest.raises(UserError) as refused:
        read_weights(str(spec), WHAT)
    sentence = str(refused.value)
    assert sentence.startswith(f"{WHAT}, but ") and "\n" not in sentence, sentence
    assert not sentence.endswith("."), sentence
    return sentence


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# What torch pickles, without torch: stand-ins under torch's names while the pickle is written.


class Storage:
    def __init__(self, key, count):
        self.key, self.count = key, count


class Tensor:
    """A tensor over the storage `key`, whose numbers `write_zip` is given."""

    def __init__(self, key, size, stride, offset=0):
        self.state = Storage(key, 0), offset, size, stride, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.state


@contextlib.contextmanager
def stand_ins():
    def _rebuild_tensor_v2(*args):
        pass

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils, torch = ModuleType("torch._utils"), ModuleType("torch")
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield torch


def pickled(content):
    buffer = io.BytesIO()
    with stand_ins() as torch:

        class Pickler(pickle.Pickler):
            def persistent_id(self, found):
                if isinstance(found, Storage):
                    return "storage", torch.FloatStorage, found.key, "cpu", found.count
                return None

        Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def write_zip(path, content, *, storages=None, byteorder="little"):
    """As torch.save writes it; `content` may be a pickle already. Storage "0" is 0, 1, ... 5."""
    storages = {"0": np.arange(6, dtype="<f4")} if storages is None else storages
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("it/data.pkl", content if isinstance(content, bytes) else pickled(content))
        archive.writestr("it/byteorder", byteorder)
        for key, numbers in storages.items():
            archive.writestr(f"it/data/{key}", numbers.tobytes())
    return path


def write_stream(path, content):
    """As torch.save wrote it before 1.6, without storages."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    heads = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    path.write_bytes(heads + content + pickle.dumps([], protocol=2))
    return path


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
