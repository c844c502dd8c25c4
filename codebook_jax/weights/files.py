"""Public weights as arrays: files, folders and names on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from codebook_jax.data.network import hub_reachable
from codebook_jax.errors import UserError, first_few
from codebook_jax.files import parse_json
from codebook_jax.weights.torch_files import Unreadable, first_line, read_torch

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# A file, the index of its shards (a JSON file), and the shards. The first format found is read, and
# only that one is downloaded.
FORMATS = (
    ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
)
WORDS = ("tokenizer.json", "vocab.txt")  # a tokenizer has one of them
TOKENIZER = ("*token*.json", "vocab.*", "merges.txt")
_GIVE = "give a weight file, a folder that holds one, or a name on the Hugging Face hub"


class Weights(NamedTuple):
    """The tensors of a file, and the facts stored beside them."""

    arrays: dict[str, np.ndarray]  # may be read-only; float16 and bfloat16 are converted to float32
    config: dict[str, Any]  # of the config.json beside them; empty if there is none
    folder: Path  # where config.json and the tokenizer are, if any


def read_weights(spec: str, what: str) -> Weights:
    """The weights of a file, a folder, or a name on the Hugging Face hub (`owner/name`, `name`,
    `name@revision`).

    Local files take precedence. Of training checkpoints only the model's tensors are read, and no
    code in a file is run. Raises UserError, beginning with `what`, if they cannot be read.
    """
    try:
        path = _local(spec)
        folder = path if path.is_dir() else path.parent
        config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        file = _weight_file(path) if path.is_dir() else path
        arrays = _read_shards(file) if file.suffix == ".json" else _read_file(file)
    except OSError as failure:
        problem = f"{failure.filename or spec} cannot be read ({failure.strerror or failure})"
        raise UserError(f"{what}, but {problem}: fix that, or {_GIVE}") from failure
    except Unreadable as failure:
        raise UserError(
            f"{what}, but {failure}; --config.init=random starts from random weights"
        ) from failure
    if all(name.startswith("module.") for name in arrays):  # DistributedDataParallel's
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return Weights(arrays, config, folder)


def _local(spec: str) -> Path:
    """The local path of the weights, downloaded if necessary."""
    local = os.path.expanduser(spec)
    if spec and os.path.exists(local):
        return Path(local)
    if "://" in spec:
        raise Unreadable("URLs cannot be read: download the file and give its path")
    name = spec.partition("@")[0]
    is_file = name.startswith(("/", ".", "~")) or spec.lower().endswith(SUFFIXES)
    if not name or is_file or name.count("/") > 1:
        raise Unreadable(f"this file or folder does not exist: {_GIVE}")
    return _downloaded(spec.removesuffix("@"))


def _downloaded(spec: str) -> Path:
    """The folder in the local hub cache with the weights, config.json and the tokenizer."""
    import huggingface_hub  # takes half a second, and local files do not need it

    name, _, revision = spec.partition("@")
    reachable = hub_reachable()
    for patterns in FORMATS:
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[CONFIG, *TOKENIZER, *patterns],
                local_files_only=not reachable,
            )
        except Exception as failure:  # the library's errors, its HTTP library's, OSError, ...
            raise Unreadable(
                f"{spec} is not a file or folder here and could not be loaded from the Hugging "
                f"Face hub ({_hub_reason(failure, reachable)}): give a file or folder, or a name "
                "on the hub with network access"
            ) from failure
        if any(Path(folder, pattern).is_file() for pattern in patterns):
            return Path(folder)
    raise Unreadable(
        f"neither model.safetensors nor pytorch_model.bin of {spec} was found on the Hugging Face "
        "hub, or, without network access, in its local cache: give the path of the weight file it "
        "has"
    )


def _hub_reason(failure: Exception, reachable: bool) -> str:
    from huggingface_hub import constants, errors

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no network"
    reasons = {
        errors.GatedRepoError: "access needs its owner's approval: log in with `hf auth login`",
        errors.RepositoryNotFoundError: "the name does not exist or is private",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.HFValidationError: "this is not a valid name there",
    }
    if constants.HF_HUB_OFFLINE or not reachable:
        reasons[errors.LocalEntryNotFoundError] = f"{offline}, and it is not in the cache"
    known = (reason for kind, reason in reasons.items() if isinstance(failure, kind))
    return next(known, first_line(failure))


def _weight_file(folder: Path) -> Path:
    """The weight file, or index of shards, to read from a folder."""
    for name in (name for whole, index, _ in FORMATS for name in (whole, index)):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise Unreadable(f"{folder} holds no weight file ({', '.join(SUFFIXES)}): {_GIVE}")
    names = first_few([path.name for path in found], 5)
    raise Unreadable(f"{folder} holds several weight files ({names}): give the path of one")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """The tensors of all files in an index."""
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise Unreadable(f"{index} has no weight_map of tensors to files: download it again")
    arrays: dict[str, np.ndarray] = {}
    for name, shard in sorted(shard_of.items(), key=lambda entry: entry[1]):
        path = index.parent / shard
        if shard != path.name or not path.is_file():
            raise Unreadable(f"{index} names {shard}, which is not beside it: download it too")
        if name not in arrays:
            arrays |= _read_file(path)
        if name not in arrays:
            raise Unreadable(f"{index} lists {name}, which is not in {shard}: download both again")
    return arrays


def _read_file(path: Path) -> dict[str, np.ndarray]:
    _refuse_placeholder(path)
    if path.suffix.lower() not in SUFFIXES:
        raise Unreadable(f"{path} does not end with {', '.join(SUFFIXES)}: {_GIVE}")
    if path.suffix.lower() != ".safetensors":
        return read_torch(path)
    arrays, kind = {}, ""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():
                kind = f"{name} as {file.get_slice(name).get_dtype()}"
                array = file.get_tensor(name)
                is_half = array.dtype.name in ("float16", "bfloat16")
                arrays[name] = array.astype(np.float32) if is_half else array
    except AttributeError as failure:  # NumPy has no such type
        raise Unreadable(f"{path} holds {kind}: convert it to float32") from failure
    except Exception as failure:  # the library's own errors derive from Exception alone
        raise Unreadable(
            f"{path} is damaged or cut short ({first_line(failure)}): download it again"
        ) from failure
    return arrays


def _read_json(path: Path) -> dict[str, Any]:
    _refuse_placeholder(path)
    try:
        content = parse_json(path.read_bytes())
    except ValueError as failure:
        raise Unreadable(f"{path} is not JSON ({failure}): download it again") from failure
    if not isinstance(content, dict):
        raise Unreadable(f"{path} is JSON but not an object: download it again")
    return content


def _refuse_placeholder(path: Path) -> None:
    """Raises Unreadable if the file is what a failed download leaves behind."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        raise Unreadable(f"{path} is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise Unreadable(f"{path} is only a git-lfs pointer: run `git lfs pull` in its folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise Unreadable(f"{path} is a web page: download the file itself")
