"""Files of torch.save: read by torch, where it is installed, without running what is in them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from weight_file import FILES, SAVED, assert_same, read, refusal

# without torch, or with an old one


def test_without_torch_the_refusal_tells_how_to_install_it_or_convert_the_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    sentence = refusal(FILES / SAVED[0])
    assert f"{FILES / SAVED[0]} needs PyTorch" in sentence
    assert "pip install 'torch>=2.6'" in sentence and "safetensors.torch.save_file" in sentence


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124"])
def test_a_torch_that_runs_code_in_files_is_refused_with_both_versions(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    sentence = refusal(FILES / SAVED[0])
    assert version in sentence and "2.6" in sentence and "CVE-2025-32434" in sentence


# with torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def saved(torch, tmp_path):
    """A file with the given content; its path."""

    def save(content, **options):
        torch.save(content, tmp_path / "it.pth", **options)
        return tmp_path / "it.pth"

    return save


@pytest.mark.parametrize("name", SAVED)
def test_both_formats_of_torch_hold_what_torch_put_in_with_halves_as_float32(torch, name):
    found = read(FILES / name)
    assert_same(found.arrays, dict(np.load(FILES / "checkpoint.npz")))
    assert found.config == {} and found.folder == FILES
    assert found.arrays["float16"].dtype == found.arrays["bfloat16"].dtype == np.float32


def test_weights_are_found_where_training_scripts_put_them(torch, saved):
    a = torch.arange(6.0).reshape(2, 3)
    weights = {"a": a, "epoch": 3, "names": ["a"]}
    stray = {"loss": a, "optimizer": {"a": 2 * a}}
    nested = [{name: weights} for name in ("model", "state_dict", "module", "model_state")]
    for content in (
        *(place | stray for place in nested),
        *({"model": place, **stray} for place in nested),
        {"model": {"depth": 12}, "state_dict": {"a": a}},  # a model without tensors
        {"model": "vit", "a": a},
    ):
        assert_same(read(saved(content)).arrays, {"a": a.numpy()})


def test_a_file_without_tensors_is_refused(torch, saved):
    itself = {"a": 1}
    itself["model"] = itself
    for content in ({}, {"a": 1}, [torch.zeros(3)], torch.zeros(3), itself):
        assert "it.pth holds no dict of tensors" in refusal(saved(content))


def test_a_type_that_is_no_weight_is_named(torch, saved):
    sentence = refusal(saved({"a.scale": torch.zeros(2, dtype=torch.float8_e4m3fn)}))
    assert "it.pth is " in sentence and "Float8_e4m3fn" in sentence


def test_other_archives_are_refused(torch, tmp_path):
    np.savez(tmp_path / "it.npz", a=np.zeros(3))
    refusal((tmp_path / "it.npz").rename(tmp_path / "it.pt"))
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "it.pt")
    assert "TorchScript" in refusal(tmp_path / "it.pt")


@pytest.mark.parametrize("name", SAVED)
def test_a_file_cut_anywhere_is_told_to_be_damaged(torch, tmp_path, name):
    content, path = (FILES / name).read_bytes(), tmp_path / name
    for length in [*range(61, len(content), 611), len(content) - 1]:
        path.write_bytes(content[:length])
        sentence = refusal(path)
        assert str(path) in sentence and ("download it again" in sentence or "asks for" in sentence)


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class Tree:
    pass


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_named_and_not_run(saved, tmp_path, is_zip):
    content = {"model": {}, "optimizer": Payload(tmp_path / "trace")}
    path = saved(content, _use_new_zipfile_serialization=is_zip)
    sentence = refusal(path)
    assert f"it.pth asks for {os.mkdir.__module__}.mkdir, " in sentence
    assert not (tmp_path / "trace").exists()
    bare = path.with_suffix(".bin")
    bare.write_bytes(pickle.dumps(content))
    refusal(bare)
    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(content))  # the payload is a real one
    assert (tmp_path / "trace").exists()


def test_a_class_of_someones_own_is_refused_by_name(saved):
    assert "test_torch_files.Tree" in refusal(saved({"model": {}, "tree": Tree()}))


def test_the_command_of_the_docs_converts_a_file(torch, saved, tmp_path):
    shared = torch.randn(4, 3)
    weights = {"a": shared, "b": shared, "turned": shared.t(), "one": torch.tensor(3)}
    path = saved({"model": weights, "epoch": 3})
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    program = page.partition('python -c "')[2].partition('" ALBEF.pth')[0]
    new = tmp_path / "it.safetensors"
    subprocess.run([sys.executable, "-c", program, path, new], check=True)
    assert_same(load_file(new), {name: tensor.numpy() for name, tensor in weights.items()})
