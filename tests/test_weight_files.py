"""Public weight files are read as torch would read them, without torch, and nothing in them is run."""

import collections
import contextlib
import fnmatch
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from codebook_jax.errors import UserError
from codebook_jax.pretrained import files
from codebook_jax.pretrained.files import read_weights

FILES = Path(__file__).parent / "goldens" / "files"  # torch itself wrote them: make_weight_files.py
WHAT = "config.init names image:it"
SAVED = ("checkpoint_zip.pth", "checkpoint_stream.pth")
SMALL = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.steps": np.array(7)}


def refusal(spec):
    """The sentence with which reading `spec` is refused; one sentence, that begins as told."""
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


# torch's files


@pytest.mark.parametrize("name", SAVED)
def test_both_formats_of_torch_hold_what_torch_put_in(name):
    read = read_weights(str(FILES / name), WHAT)
    assert_same(read.arrays, dict(np.load(FILES / "checkpoint.npz")))
    assert read.name == str(FILES / name) and read.config == {} and read.folder is None


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
    assert "test_weight_files.Tree" in refusal(write_zip(tmp_path / "it.pt", pickle.dumps(Tree())))


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


# safetensors


def test_safetensors_are_read_with_halves_as_float32(tmp_path):
    exact = np.array([[1.5, -2.0, 3e38], [0.0, -0.0, 1e-40]])
    brain = exact.astype(ml_dtypes.bfloat16)
    half = exact[:, :2].astype(np.float16)
    counts = {f"u{bits}": np.arange(3, dtype=f"uint{bits}") for bits in (8, 16, 32, 64)}
    plain = {**SMALL, **counts, "double": exact, "bool": np.array([True, False])}
    save_file(plain, tmp_path / "plain.safetensors")
    assert_same(read_weights(str(tmp_path / "plain.safetensors"), WHAT).arrays, plain)
    path = write_safetensors(
        tmp_path / "halves.safetensors",
        {
            "first": ("F32", [1], np.float32(4).tobytes()),
            "brain": ("BF16", [2, 3], brain.tobytes()),
            "scalar": ("BF16", [], brain[0, 0].tobytes()),
            "none": ("BF16", [0, 3], b""),
            "half": ("F16", [2, 2], half.tobytes()),
        },
    )
    expected = {
        "first": np.array([4], np.float32),
        "brain": brain.astype(np.float32),
        "scalar": np.array(1.5, np.float32),
        "none": np.empty((0, 3), np.float32),
        "half": half.astype(np.float32),
    }
    assert_same(read_weights(str(path), WHAT).arrays, expected)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "C64"])
def test_types_that_are_no_weights_are_named(tmp_path, kind):
    content = bytes(16 if kind == "C64" else 2)
    path = write_safetensors(tmp_path / "it.safetensors", {"a.scale": (kind, [2], content)})
    assert f"it.safetensors holds a.scale as {kind}" in refusal(path)


# damage


@pytest.fixture(params=["checkpoint_zip.pth", "checkpoint_stream.pth", "it.safetensors"])
def sound(request, tmp_path):
    if request.param != "it.safetensors":
        return shutil.copy(FILES / request.param, tmp_path / request.param)
    tensors = {"a": ("BF16", [50], bytes(100)), "b": ("F32", [50], bytes(200))}
    return write_safetensors(tmp_path / request.param, tensors)


def test_a_file_cut_anywhere_is_told_to_be_damaged(sound):
    content = sound.read_bytes()
    assert read_weights(str(sound), WHAT).arrays
    for length in [*range(0, len(content), 61), len(content) - 1]:
        sound.write_bytes(content[:length])
        sentence = refusal(sound)
        assert str(sound) in sentence and "download it again" in sentence, sentence


def test_no_library_s_error_comes_out_of_a_changed_file(sound):
    """Any byte may be wrong: then the file is read, or refused in a sentence."""
    content, rng = sound.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(content), size=200):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        sound.write_bytes(changed)
        try:
            read_weights(str(sound), WHAT)
        except UserError:
            refused += 1
    assert refused > 5


def test_a_damaged_memo_takes_no_memory(tmp_path):
    far = b"\x80\x02Nr" + struct.pack("<I", 2**22) + b"."
    assert pickle.loads(far) is None
    assert "it.pth is damaged" in refusal(write_zip(tmp_path / "it.pth", far))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "is a web page"),
        (b"\n  <html class=''>", "is a web page"),
        (b'{"error": "Entry not found"}', "damaged"),
        (b"configuration\nof a model\n", "damaged"),
        (pickle.dumps({"a": 1}), "damaged"),
        (bytes(1000), "damaged"),
    ],
)
def test_what_a_failed_download_leaves_is_told_apart(tmp_path, suffix, content, told):
    path = tmp_path / f"it{suffix}"
    path.write_bytes(content)
    sentence = refusal(path)
    assert str(path) in sentence and told in sentence


def test_a_file_that_may_not_be_opened_is_told(tmp_path, monkeypatch):
    def closed(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "it.pth"
    path.write_bytes(b"x")
    monkeypatch.setattr("builtins.open", closed)
    assert "it.pth cannot be read (Permission denied)" in refusal(path)


# folders


def write_shards(folder, names=("a", "b"), suffix="safetensors", stem="model"):
    """One tensor a shard, and the index."""
    weight_map = {}
    for number, name in enumerate(names, 1):
        shard = f"{stem}-{number:05}-of-{len(names):05}.{suffix}"
        weight_map[name] = shard
        if suffix == "safetensors":
            save_file({name: np.full(3, number, np.float32)}, folder / shard)
        else:
            numbers = {"0": np.full(3, number, np.float32)}
            write_zip(folder / shard, {name: Tensor("0", (3,), (1,))}, storages=numbers)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_are_joined(tmp_path, suffix, stem):
    write_shards(tmp_path, ("module.a", "b"), suffix=suffix, stem=stem)
    read = read_weights(str(tmp_path), WHAT)
    assert_same(
        read.arrays, {"module.a": np.full(3, 1, np.float32), "b": np.full(3, 2, np.float32)}
    )
    assert read.folder == tmp_path


def test_a_folder_gives_its_safetensors_before_its_pickles(tmp_path):
    save_file(SMALL, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    (tmp_path / "tf_model.h5").write_bytes(b"not read")
    assert_same(read_weights(str(tmp_path), WHAT).arrays, SMALL)


def test_the_only_weight_file_of_a_folder_is_its_weights(tmp_path):
    (tmp_path / "README.md").write_text("a model")
    assert "holds no weight file" in refusal(tmp_path)
    save_file(SMALL, tmp_path / "epoch-30.safetensors")
    assert_same(read_weights(str(tmp_path), WHAT).arrays, SMALL)
    shutil.copy(FILES / SAVED[0], tmp_path / "other.pth")
    assert "(epoch-30.safetensors, other.pth): give the path of one" in refusal(tmp_path)


def test_an_index_and_its_shards_have_to_agree(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert "names model-00002-of-00002.safetensors, which is not beside it" in refusal(tmp_path)
    save_file(SMALL, tmp_path / "model-00002-of-00002.safetensors")
    assert "lists b, which is not in model-00002-of-00002.safetensors" in refusal(tmp_path)
    for weight_map in ({"a.steps": "../outside.safetensors"}, {"a": 1}, ["a"], None):
        save_file(SMALL, tmp_path.parent / "outside.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert str(index) in refusal(tmp_path)
    index.write_text("{")
    assert f"{index} is no JSON" in refusal(tmp_path)


def test_config_json_beside_the_weights_is_read(tmp_path):
    save_file(SMALL, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    assert read_weights(str(path), WHAT)[2:] == ({}, None)
    assert read_weights(str(tmp_path), WHAT)[2:] == ({}, tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    for spec in (path, tmp_path):
        assert read_weights(str(spec), WHAT)[2:] == ({"hidden_size": 768}, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_damaged_config_json_is_named(tmp_path, content):
    save_file(SMALL, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content, encoding="latin1")
    assert "config.json is " in refusal(tmp_path)


# names


@pytest.mark.parametrize(
    "spec", ["", "/no/such", "./it", "~/no/such", "it.pth", "owner/it.SafeTensors", "a/b/c"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(spec, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "there is no such file or folder" in refusal(spec)


def test_an_address_is_to_be_downloaded_first():
    assert "download the file" in refusal("https://dl.fbaipublicfiles.com/deit/deit_base.pth")


def test_a_file_of_another_kind_is_told_by_its_name(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"HDF")
    assert "does not end with .safetensors, .pth, .pt, .bin" in refusal(tmp_path / "tf_model.h5")


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one name, `owner/it`, whose files are in `repository`; `calls` and `had` are what was asked for."""
    hub = SimpleNamespace(repository=tmp_path / "repository", calls=[], had=set(), fails=None)
    hub.repository.mkdir()

    def snapshot_download(name, *, revision, allow_patterns, local_files_only):
        assert not local_files_only
        hub.calls.append((name, revision))
        if hub.fails is not None:
            raise hub.fails
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for path in hub.repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
                hub.had.add(path.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(files, "hub_reachable", lambda: True)
    return hub


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("owner/it", ("owner/it", None)),
        ("it", ("it", None)),
        ("owner/it@refs/pr/2", ("owner/it", "refs/pr/2")),
        ("owner/it@", ("owner/it", None)),
    ],
)
def test_only_one_format_and_the_tokenizer_come_from_the_hub(hub, tmp_path, spec, asked):
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "vocab.txt", "tokenizer.json"):
        (hub.repository / name).write_text("x")
    (hub.repository / "config.json").write_text('{"hidden_size": 3}')
    (hub.repository / "fp16.safetensors").write_text("x")
    save_file(SMALL, hub.repository / "model.safetensors")
    read = read_weights(spec, WHAT)
    assert_same(read.arrays, SMALL)
    assert read[2:] == ({"hidden_size": 3}, tmp_path / "cache") and read.name == spec
    assert hub.calls == [asked]
    assert hub.had == {"config.json", "vocab.txt", "tokenizer.json", "model.safetensors"}


def test_pickles_come_from_the_hub_where_there_are_no_safetensors(hub):
    shutil.copy(FILES / SAVED[1], hub.repository / "pytorch_model.bin")
    read = read_weights("owner/it", WHAT)
    assert_same(read.arrays, dict(np.load(FILES / "checkpoint.npz")))


def test_shards_come_from_the_hub(hub):
    write_shards(hub.repository)
    assert read_weights("owner/it", WHAT).arrays.keys() == {"a", "b"}


def test_a_name_without_weights_on_the_hub_is_told(hub):
    (hub.repository / "config.json").write_text("{}")
    sentence = refusal("owner/it")
    assert "neither model.safetensors nor pytorch_model.bin of owner/it" in sentence


def no_response(kind):
    failure = kind.__new__(kind)
    failure.args = ("403 Client Error. (Request ID: 1)\n\nA long story.",)
    return failure


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (no_response(errors.GatedRepoError), "grants access"),
        (no_response(errors.RepositoryNotFoundError), "there is no such name"),
        (no_response(errors.RevisionNotFoundError), "no such revision"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError("Data processing error: CAS\nand a long story."),
            "(Data processing error: CAS)",
        ),
    ],
)
def test_a_failure_of_the_hub_is_one_sentence(hub, failure, told):
    hub.fails = failure
    sentence = refusal("owner/it@v2")
    assert "owner/it@v2 is no file or folder here, and could not be had from" in sentence
    assert told in sentence and "story" not in sentence


@pytest.mark.parametrize("spec", ["bert-base-uncased", "owner/it", "owner/it@main"])
@pytest.mark.parametrize(
    ("offline", "told"), [(True, "HF_HUB_OFFLINE is set"), (False, "there is no network")]
)
def test_without_a_network_a_name_of_the_hub_is_refused(tmp_path, monkeypatch, spec, offline, told):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(files, "hub_reachable", lambda: offline)
    assert f"({told}, and it was not downloaded before)" in refusal(spec)


def test_a_name_that_no_hub_can_have_is_refused():
    assert "(no name there looks like this)" in refusal("bad name!")


def test_what_was_downloaded_before_is_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--owner--it", "0123456789" * 4
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").write_text("[PAD]\n")
    assert "could be had" in refusal("owner/it")
    shutil.copy(FILES / SAVED[1], snapshot / "pytorch_model.bin")
    for spec in ("owner/it", "owner/it@main", f"owner/it@{commit}"):
        read = read_weights(spec, WHAT)
        assert_same(read.arrays, dict(np.load(FILES / "checkpoint.npz")))
        assert read.folder == snapshot
