"""Public weights as arrays: files, folders and names on the Hugging Face hub."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from codebook_jax.data.network import hub_reachable
from codebook_jax.errors import UserError, first_few, reason
from codebook_jax.files import parse_json

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# A file, and the shards it may be split into. The first format found is read, and only that one is
# downloaded.
FORMATS = (
    ("model.safetensors", "model-?????-of-?????.safetensors"),
    ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin"),
)
WORDS = ("tokenizer.json", "vocab.txt")  # a tokenizer has one of them
TOKENIZER = ("*token*.json", "vocab.*", "merges.txt")
_TORCH = "2.6"  # older ones run code in a file even with weights_only (CVE-2025-32434)
_NESTED = ("model", "state_dict", "module", "model_state")  # where training scripts put the weights
_MOST_NESTED = 4  # a pickle can contain itself
_SCALAR = np.float64(0).__reduce__()[0]  # the function that makes NumPy's numbers from a pickle
_HARMLESS = [  # what training scripts save beside the weights, under its names in old and new files
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]
_GIVE = "give a weight file, a folder that holds one, or a name on the Hugging Face hub"


class Weights(NamedTuple):
    """The tensors of a file, and the facts stored beside them."""

    arrays: dict[str, np.ndarray]  # may be read-only
    config: dict[str, Any]  # of the config.json beside them; empty if there is none
    folder: Path  # where config.json and the tokenizer are, if any


def read_weights(spec: str, what: str) -> Weights:
    """The weights of a file or folder, or else of a name on the Hugging Face hub (`owner/name`,
    `name`, `name@revision`). Of training checkpoints only the model's tensors are read, and no code
    is run. Raises UserError, beginning with `what`, if they cannot be read.
    """
    try:
        path = _local(spec)
        folder = path if path.is_dir() else path.parent
        config = _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        arrays: dict[str, np.ndarray] = {}
        for file in _weight_files(path) if path.is_dir() else [path]:
            arrays |= _read(file)
    except OSError as failure:
        problem = f"{failure.filename or spec} cannot be read ({failure.strerror or failure})"
        raise UserError(f"{what}, but {problem}: fix that, or {_GIVE}") from failure
    except UserError as failure:
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
    name = spec.partition("@")[0]
    is_file = name.startswith(("/", ".", "~")) or spec.lower().endswith(SUFFIXES)
    if not name or is_file or name.count("/") > 1:
        raise UserError(f"this file or folder does not exist (of a URL, download it): {_GIVE}")
    return _downloaded(spec.removesuffix("@"))


def _downloaded(spec: str) -> Path:
    """The folder in the local hub cache with the weights, config.json and the tokenizer."""
    import huggingface_hub  # takes half a second, and local files do not need it
    from huggingface_hub import constants, errors

    name, _, revision = spec.partition("@")
    offline = "" if hub_reachable() else "there is no network"
    for patterns in FORMATS:
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[CONFIG, *TOKENIZER, *patterns],
                local_files_only=bool(offline),
            )
        except Exception as failure:  # the library's errors, its HTTP library's, OSError, ...
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else offline
            absent = offline and isinstance(failure, errors.LocalEntryNotFoundError)
            why = f"{offline}, and it is not in the cache" if absent else reason(failure)
            raise UserError(
                f"{spec} is not a file or folder here and could not be loaded from the Hugging "
                f"Face hub ({why}): give a file or folder, or check the name and revision, and log "
                "in with `hf auth login` if they are private or need their owner's approval"
            ) from failure
        if any(found for pattern in patterns for found in Path(folder).glob(pattern)):
            break
    return Path(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The weight file of a folder, or its shards."""
    for pattern in (pattern for patterns in FORMATS for pattern in patterns):
        if found := sorted(folder.glob(pattern)):
            count = int(found[0].stem.rpartition("-of-")[2]) if "-of-" in found[0].stem else 1
            if len(found) == count:
                return found
            raise UserError(f"{folder} holds {len(found)} of {count} {pattern}: download them all")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) == 1:
        return found
    if not found:
        raise UserError(f"{folder} holds no weight file ({', '.join(SUFFIXES)}): {_GIVE}")
    names = first_few([path.name for path in found], 5)
    raise UserError(f"{folder} holds several weight files ({names}): give the path of one")


def _read(path: Path) -> dict[str, Any]:
    """The content of a weight file, or of a JSON object."""
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ".json"):
        raise UserError(f"{path} does not end with {', '.join(SUFFIXES)}: {_GIVE}")
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    try:
        if suffix == ".json":
            return dict(parse_json(path.read_bytes()))
        return safetensors.numpy.load_file(path) if suffix == ".safetensors" else _read_torch(path)
    except UserError:
        raise
    except Exception as failure:  # whatever the libraries raise for a damaged file
        if start.startswith(b"version https://git-lfs"):
            why = "is only a git-lfs pointer: run `git lfs pull` in its folder"
        elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
            why = "is a web page: download the file itself"
        else:
            why = (
                f"is damaged or not what its name says ({reason(failure)}): download it again, or "
                "save its tensors in float32 as .safetensors"
            )
        raise UserError(f"{path} {why}") from failure


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file's state dict, perhaps views of it: float16 and bfloat16 as float32,
    others unchanged. Raises UserError for what is no file of weights, and whatever torch, pickle
    and zipfile raise for a damaged one.
    """
    torch = _import_torch(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # older files cannot be mapped
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            # weights_only: runs no code in the file
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as failure:
        if refused := re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(failure)):
            raise UserError(
                f"{path} asks for {refused[1]}, which weights do not need and which could run any "
                "code: if you trust it, load it with torch and save its state_dict as .safetensors"
            ) from failure
        raise ValueError(str(failure).rpartition("WeightsUnpickler error: ")[2]) from failure
    tensors = _state_dict(content, torch)
    if tensors is None:
        raise UserError(
            f"{path} holds no dict of tensors, neither at the top nor under {', '.join(_NESTED)}: "
            "give a file with a state_dict"
        )
    halves = (torch.float16, torch.bfloat16)
    return {
        name: (tensor.float() if tensor.dtype in halves else tensor).detach().numpy()
        for name, tensor in tensors.items()
    }


def _import_torch(path: Path) -> ModuleType:
    """The torch module; raises UserError if it is missing or too old to be safe."""
    try:
        import torch  # an extra of its own: other formats do not need it

        number = [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]]
        if number >= [int(part) for part in _TORCH.split(".")]:
            return torch
        why = f"{torch.__version__} is installed, in which a file can run code (CVE-2025-32434)"
    except (ImportError, OSError) as failure:  # OSError: one of its libraries is missing
        why = f"it cannot be imported ({reason(failure)})"
    raise UserError(
        f"{path} needs PyTorch {_TORCH} or newer, but {why}: pip install 'torch>={_TORCH}', or "
        "load it where PyTorch is and save its state_dict with safetensors.torch.save_file"
    )


def _state_dict(content: Any, torch: ModuleType, levels: int = _MOST_NESTED) -> dict | None:
    """The tensors of the innermost dict that has some; None if there are none."""
    if not isinstance(content, dict) or not levels:
        return None
    for key in _NESTED:
        if found := _state_dict(content.get(key), torch, levels - 1):
            return found
    named = ((name, value) for name, value in content.items() if isinstance(name, str))
    return {name: value for name, value in named if torch.is_tensor(value)} or None
