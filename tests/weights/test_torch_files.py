"""Files of torch.save are read without torch, and a pickle that asks for more is refused by
name.
"""

import contextlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from weight_file import FILES, SAVED, WHAT, Tensor, assert_same, refusal, write_stream, write_zip

from codebook_jax.weights.files import read_weights

# torch's files


@pytest.mark.parametrize("name", SAVED)
def test_both_formats_of_torch_hold_what_torch_put_in(name):
    read = read_weights(str(FILES / name), WHAT)
    assert_same(read.arrays, dict(np.load(FILES / "checkpoint.npz")))
    assert read.config == {} and read.folder == FILES


@pytest.mark.parametrize("name", SAVED)
def test_halves_become_float32_and_all_else_keeps_its_type(name):
    arrays = read_weights(str(FILES / name), WHAT).arrays
    kept = ("float64", "int32", "int16", "int8", "uint8", "bool")
    assert {key: str(arrays[key].dtype) for key in kept} == {key: key for key in kept}
    assert arrays["float16"].dtype == arrays["bfloat16"].dtype == np.float32
    assert arrays["int64_scalar"].dtype == np.int64 and arrays["int64_scalar"] == 2**40 + 1


def test_torch_is_not_imported():
    code = (
        "import sys; from codebook_jax.pretrained.files import read_weights; "
        f"read_weights({str(FILES / SAVED[0])!r}, ''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_optimizer_s_storages_are_not_read(tmp_path):
    with zipfile.ZipFile(FILES / SAVED[0]) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    newest = max((name for name in contents if "/data/" in name), key=lambda n: int(Path(n).name))
    for gone, readable in ((newest, True), (newest.rpartition("/")[0] + "/0", False)):
        path = tmp_path / f"{readable}.pth"
        with zipfile.ZipFile(path, "w") as archive:
            for name in contents.keys() - {gone}:
                archive.writestr(name, contents[name])
        if readable:
            assert_same(read_weights(str(path), WHAT).arrays, np.load(FILES / "checkpoint.npz"))
        else:
            assert "damaged" in refusal(path)


@pytest.mark.parametrize("nested", ["model", "state_dict", "module", "model_state"])
def test_weights_are_found_where_training_scripts_put_them(tmp_path, nested):
    weights = {"a": Tensor("0", (2, 3), (3, 1)), "epoch": 3, "names": ["a"]}
    stray = {"loss": Tensor("0", (), ()), "optimizer": {"a": Tensor("0", (2,), (1,))}}
    for content in ({nested: weights, **stray}, {"model": {nested: weights}, **stray}):
        arrays = read_weights(str(write_zip(tmp_path / "it.pth", content)), WHAT).arrays
        assert_same(arrays, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_a_key_that_holds_no_tensors_is_not_taken_for_the_weights(tmp_path):
    tensor = Tensor("0", (6,), (1,))
    for content in (
        {"model": {"depth": 12}, "state_dict": {"a": tensor}},
        {"model": "vit", "a": tensor},
    ):
        path = write_zip(tmp_path / "it.pth", content)
        assert read_weights(str(path), WHAT).arrays.keys() == {"a"}


def test_the_prefix_of_distributed_training_goes_when_all_names_have_it(tmp_path):
    tensor = Tensor("0", (6,), (1,))
    path = write_zip(tmp_path / "it.pth", {"module.a": tensor, "module.module.b": tensor})
    assert read_weights(str(path), WHAT).arrays.keys() == {"a", "module.b"}
    path = write_zip(tmp_path / "it.pth", {"module.a": tensor, "b": tensor})
    assert read_weights(str(path), WHAT).arrays.keys() == {"module.a", "b"}


def test_numbers_of_a_big_endian_machine_are_turned(tmp_path):
    storages = {"0": np.arange(6, dtype=">f4")}
    content = {"a": Tensor("0", (6,), (1,))}
    path = write_zip(tmp_path / "it.pth", content, storages=storages, byteorder="big")
    assert_same(read_weights(str(path), WHAT).arrays, {"a": np.arange(6, dtype=np.float32)})


def test_a_file_without_tensors_is_refused(tmp_path):
    itself = {"a": 1}
    itself["model"] = itself
    for content in ({}, {"a": 1}, [Tensor("0", (6,), (1,))], Tensor("0", (6,), (1,)), itself):
        sentence = refusal(write_zip(tmp_path / "it.pth", content))
        assert "it.pth holds no dict of tensors" in sentence


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((), (), 6),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((-2,), (1,), 0),
        ((2, 3), (1,), 0),
        ((2.0,), (1,), 0),
        ((2**62, 2**62), (2**62, 1), 0),
        ((1,) * 100, (1,) * 100, 0),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_damage(tmp_path, size, stride, offset):
    content = {"sound": Tensor("0", (6,), (1,)), "a": Tensor("0", size, stride, offset)}
    assert "it.pth is damaged" in refusal(write_zip(tmp_path / "it.pth", content))


def test_strides_and_offsets_are_honoured(tmp_path):
    content = {
        "turned": Tensor("0", (3, 2), (1, 3)),
        "last": Tensor("0", (), (), 5),
        "repeated": Tensor("0", (2, 3), (0, 2)),
        "none": Tensor("0", (0, 3), (3, 1), 6),
    }
    numbers = np.arange(6, dtype=np.float32)
    expected = {
        "turned": numbers.reshape(2, 3).T,
        "last": numbers[5].reshape(()),
        "repeated": np.stack([numbers[::2]] * 2),
        "none": np.empty((0, 3), np.float32),
    }
    read = read_weights(str(write_zip(tmp_path / "it.pth", content)), WHAT).arrays
    assert_same(read, expected)


def test_other_zip_archives_are_refused_with_what_they_are(tmp_path):
    path = tmp_path / "it.pt"
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    shutil.move(path.with_suffix(".npz"), path)
    assert "without torch.save's data.pkl" in refusal(path)
    write_zip(path, {"a": Tensor("0", (6,), (1,))})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("it/constants.pkl", b"")
    assert "TorchScript" in refusal(path)


# what wants to run


class Payload:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def payloads(trace):
    """Pickles that create the file `trace` when they are loaded, and what they call."""
    touch = f"touch {trace}"
    system = f"{os.system.__module__}.system"
    return {
        "plain": (pickle.dumps(Payload(os.system, touch)), system),
        "protocol 2": (pickle.dumps({"a": Payload(os.system, touch)}, protocol=2), system),
        "protocol 0": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        "INST": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "os.system"),
        "eval": (pickle.dumps(Payload(eval, f"open({str(trace)!r}, 'w')")), "builtins.eval"),
        "in an optimizer": (
            pickle.dumps({"model": {}, "optimizer": Payload(os.system, touch)}),
            system,
        ),
    }


@pytest.mark.parametrize("wrapped", ["zip", "stream", "bare"])
@pytest.mark.parametrize("kind", payloads(""))
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, kind, wrapped):
    trace = tmp_path / "trace"
    payload, called = payloads(trace)[kind]
    path = tmp_path / "it.bin"
    if wrapped == "zip":
        write_zip(path, payload)
    elif wrapped == "stream":
        write_stream(path, payload)
    else:
        path.write_bytes(payload)
    sentence = refusal(path)
    assert f"it.bin asks for {called}, " in sentence and "refused" in sentence
    assert not trace.exists()
    with contextlib.suppress(Exception):
        pickle.loads(payload)  # the payload is a real one
    assert trace.exists()


def test_what_is_allowed_does_not_lead_to_its_attributes(tmp_path):
    """Python looks up dotted names part by part: collections holds all of sys."""
    name = b"_sys.modules.clear"
    dotted = b"\x80\x04\x8c\x0bcollections\x8c" + bytes([len(name)]) + name + b"\x93."
    assert callable(pickle.loads(dotted))
    sentence = refusal(write_zip(tmp_path / "it.pth", dotted))
    assert "asks for collections._sys.modules.clear, " in sentence


def test_a_class_of_someone_s_own_is_refused_by_name(tmp_path):
    assert "test_torch_files.Tree" in refusal(write_zip(tmp_path / "it.pt", pickle.dumps(Tree())))


class Tree:
    pass


@pytest.mark.parametrize(
    "named", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nSize"]
)
def test_a_pickle_cannot_change_the_reader(tmp_path, named):
    """BUILD sets attributes of what is on the stack, which here is the reader's own."""
    for state in ({"version": 3, "__init__": None}, (None, {"version": 3, "__init__": None})):
        tail = pickle.dumps(state, protocol=2)[2:-1]
        refusal(write_zip(tmp_path / "it.pth", b"\x80\x02c" + named + b"\n" + tail + b"b."))
    read = read_weights(str(FILES / SAVED[0]), WHAT)
    assert_same(read.arrays, dict(np.load(FILES / "checkpoint.npz")))


def test_a_damaged_memo_takes_no_memory(tmp_path):
    far = b"\x80\x02Nr" + struct.pack("<I", 2**22) + b"."
    assert pickle.loads(far) is None
    assert "it.pth is damaged" in refusal(write_zip(tmp_path / "it.pth", far))
