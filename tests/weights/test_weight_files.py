"""Public weights are found and read: files, folders with shards, names on the hub; damage gives one
sentence.
"""

import fnmatch
import shutil
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file
from weight_file import SMALL, assert_same, read, refusal, write_safetensors

from codebook_jax.weights import files
from codebook_jax.weights.fill import as_float32

# safetensors


def test_safetensors_are_read_and_halves_are_weights(tmp_path):
    exact = np.array([[1.5, -2.0, 3e38], [0.0, -0.0, 1e-40]])
    brain = exact.astype(ml_dtypes.bfloat16)
    half = exact[:, :2].astype(np.float16)
    plain = {**SMALL, "u64": np.arange(3, dtype=np.uint64), "double": exact, "bool": exact > 0}
    save_file(plain, tmp_path / "plain.safetensors")
    assert_same(read(tmp_path / "plain.safetensors").arrays, plain)
    tensors = {"brain": ("BF16", [2, 3], brain.tobytes()), "half": ("F16", [2, 2], half.tobytes())}
    found = read(write_safetensors(tmp_path / "halves.safetensors", tensors)).arrays
    found = {name: as_float32(array, name, "it") for name, array in found.items()}
    assert_same(found, {"brain": brain.astype(np.float32), "half": half.astype(np.float32)})


def test_types_that_are_no_weights_are_named(tmp_path):
    path = write_safetensors(tmp_path / "it.safetensors", {"a.scale": ("F8_E4M3", [2], bytes(2))})
    sentence = refusal(path)
    assert "it.safetensors is " in sentence and "float8_e4m3" in sentence


# damage


def test_a_file_cut_anywhere_is_told_to_be_damaged(tmp_path):
    tensors = {"a": ("BF16", [50], bytes(100)), "b": ("F32", [50], bytes(200))}
    sound = write_safetensors(tmp_path / "it.safetensors", tensors)
    content = sound.read_bytes()
    assert read(sound).arrays
    for length in [*range(0, len(content), 61), len(content) - 1]:
        sound.write_bytes(content[:length])
        sentence = refusal(sound)
        assert str(sound) in sentence and "download it again" in sentence, sentence


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs"),
        (b"<!DOCTYPE html>\n<html><head><title>404</title>", "is a web page"),
        (b"\n  <html class=''>", "is a web page"),
        (b'{"error": "Entry not found"}', "damaged"),
        (b"", "damaged"),
        (bytes(1000), "damaged"),
    ],
)
def test_what_a_failed_download_leaves_is_told_apart(tmp_path, content, told):
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    sentence = refusal(path)
    assert str(path) in sentence and told in sentence
    assert "--config.init=random" in sentence


# folders


@pytest.fixture
def numpy_for_torch(monkeypatch):
    """Files of torch are NumPy's."""
    monkeypatch.setattr(files, "_read_torch", lambda path: dict(np.load(path)))


def saved_by_torch(arrays, path):
    np.savez(path.with_suffix(".npz"), **arrays)
    path.with_suffix(".npz").rename(path)


def write_shards(folder, names=("a", "b"), suffix="safetensors", stem="model"):
    """One tensor per shard; the last one's path."""
    save = save_file if suffix == "safetensors" else saved_by_torch
    for number, name in enumerate(names, 1):
        path = folder / f"{stem}-{number:05}-of-{len(names):05}.{suffix}"
        save({name: np.full(3, number, np.float32)}, path)
    return path


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_are_joined(numpy_for_torch, tmp_path, suffix, stem):
    write_shards(tmp_path, ("module.a", "b"), suffix=suffix, stem=stem)
    expected = {"module.a": np.full(3, 1, np.float32), "b": np.full(3, 2, np.float32)}
    assert_same(read(tmp_path).arrays, expected)
    assert read(tmp_path).folder == tmp_path


def test_the_weight_file_of_a_folder_is_its_safetensors_or_its_only_one(tmp_path):
    (tmp_path / "README.md").write_text("a model")
    assert "holds no weight file" in refusal(tmp_path)
    save_file(SMALL, tmp_path / "epoch-30.safetensors")
    assert_same(read(tmp_path).arrays, SMALL)
    (tmp_path / "other.pth").write_bytes(b"not read")
    assert "(epoch-30.safetensors, other.pth): give the path of one" in refusal(tmp_path)
    save_file(SMALL | {"b": np.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert "b" in read(tmp_path).arrays


def test_the_prefix_of_distributed_training_goes_when_all_names_have_it(tmp_path):
    path, array = tmp_path / "it.safetensors", np.zeros(3, np.float32)
    save_file({"module.a": array, "module.module.b": array}, path)
    assert read(path).arrays.keys() == {"a", "module.b"}
    save_file({"module.a": array, "b": array}, path)
    assert read(path).arrays.keys() == {"module.a", "b"}


def test_a_missing_shard_is_told(tmp_path):
    write_shards(tmp_path).unlink()
    assert f"{tmp_path} holds 1 of 2 model-" in refusal(tmp_path)


def test_config_json_beside_the_weights_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(SMALL, path)
    assert read(path)[1:] == read(tmp_path)[1:] == ({}, tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    assert read(path)[1:] == read(tmp_path)[1:] == ({"hidden_size": 768}, tmp_path)
    for content in ("", "{", "[1]", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_text(content, encoding="latin1")
        assert "config.json is " in refusal(path)


# names


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        *((spec, "does not exist") for spec in ("", "/no/such", "./it", "~/no", "it.pth", "a/b/c")),
        ("owner/it.SafeTensors", "does not exist"),
        ("https://dl.fbaipublicfiles.com/deit/deit_base.pth", "download it"),
        (__file__, "does not end with .safetensors, .pth, .pt, .bin"),
    ],
)
def test_what_is_not_a_weight_file_is_not_looked_for_on_the_hub(spec, told, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert told in refusal(spec)


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one name, `owner/it`, whose files are in `repository`; `calls` and `had` record the
    requests and the files.
    """
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
    found = read(spec)
    assert_same(found.arrays, SMALL)
    assert found[1:] == ({"hidden_size": 3}, tmp_path / "cache")
    assert hub.calls == [asked]
    assert hub.had == {"config.json", "vocab.txt", "tokenizer.json", "model.safetensors"}


def test_other_forms_of_weights_come_from_the_hub_too(hub, numpy_for_torch):
    (hub.repository / "config.json").write_text("{}")
    assert "holds no weight file (.safetensors, " in refusal("owner/it")
    saved_by_torch(SMALL, hub.repository / "pytorch_model.bin")
    assert_same(read("owner/it").arrays, SMALL)
    write_shards(hub.repository)
    assert read("owner/it").arrays.keys() == {"a", "b"}


def no_response(kind):
    failure = kind.__new__(kind)
    failure.args = ("403 Client Error. (Request ID: 1)\n\nA long story.",)
    return failure


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (no_response(errors.GatedRepoError), "`hf auth login`"),
        (no_response(errors.RepositoryNotFoundError), "private"),
        (no_response(errors.RevisionNotFoundError), "RevisionNotFound"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Data processing error: CAS\nand a long story."), "Data processing error"),
    ],
)
def test_a_failure_of_the_hub_is_one_sentence(hub, failure, told):
    hub.fails = failure
    sentence = refusal("owner/it@v2")
    assert "owner/it@v2 " in sentence and "hub" in sentence
    assert told in sentence and "story" not in sentence


@pytest.mark.parametrize(
    ("offline", "told"), [(True, "HF_HUB_OFFLINE is set"), (False, "there is no network")]
)
def test_without_a_network_a_name_of_the_hub_is_refused(tmp_path, monkeypatch, offline, told):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(files, "hub_reachable", lambda: offline)
    for spec in ("bert-base-uncased", "owner/it", "owner/it@main"):
        sentence = refusal(spec)
        assert f"({told}" in sentence and f"{spec} " in sentence
    assert "bad name! " in refusal("bad name!")


def test_what_was_downloaded_before_is_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--owner--it", "0123456789" * 4
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.txt").write_text("[PAD]\n")
    assert f"{snapshot} holds no weight file" in refusal("owner/it")
    save_file(SMALL, snapshot / "model.safetensors")
    for spec in ("owner/it", "owner/it@main", f"owner/it@{commit}"):
        assert_same(read(spec).arrays, SMALL)
        assert read(spec).folder == snapshot
