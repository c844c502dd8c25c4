"""Public weights as arrays: files, folders and names on the Hugging Face hub, read without
torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from jaxtyping import Float32

from codebook_jax.data.network import hub_reachable
from codebook_jax.errors import UserError
from codebook_jax.files import parse_json
from codebook_jax.weights.torch_files import first_line, float32_of, read_torch
from codebook_jax.weights.unpickling import Unreadable

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".bin")
# In a folder, the first that exists is read. An index is a JSON file that maps tensors to shards.
CHOICE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WORDS = ("tokenizer.json", "vocab.txt")  # a tokenizer has one of them
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
# Tried in this order, so that only one format is downloaded.
HUB_PATTERNS = (
    ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
)

_WIDTHS = (8, 16, 32, 64)
_READ_TYPES = {"BOOL", "BF16", "F16", "F32", "F64", *(f"{k}{n}" for k in "IU" for n in _WIDTHS)}
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
    code in a file is run. Raises UserError, beginning with `what`, if the weights cannot be found
    or read.
    """
    path = _located(spec, what)
    folder = path if path.is_dir() else path.parent
    described = (folder / CONFIG).is_file()
    config = _read_json(folder / CONFIG, what) if described else {}
    if not path.is_dir():
        return Weights(_read_file(path, what), config, folder)
    with _reading(path, what):
        chosen = _chosen(path)
    read = _read_shards if chosen.suffix == ".json" else _read_file
    return Weights(read(chosen, what), config, folder)


def _located(spec: str, what: str) -> Path:
    """The local path of the weights, downloaded if necessary."""
    local = os.path.expanduser(spec)
    if spec and os.path.exists(local):
        return Path(local)
    if "://" in spec:
        raise UserError(f"{what}, but URLs cannot be read: download the file and give its path")
    name, _, revision = spec.partition("@")
    suffixed = spec.lower().endswith((SAFETENSORS, *TORCH))
    if not name or name[0] in "/.~" or suffixed or name.count("/") > 1:
        raise UserError(f"{what}, but this file or folder does not exist: {_GIVE}")
    return _downloaded(name, revision or None, what)


def _downloaded(name: str, revision: str | None, what: str) -> Path:
    """The folder in the local hub cache with the weights (one format only), config.json and the
    tokenizer.
    """
    import huggingface_hub  # takes half a second, and local files do not need it

    called = f"{name}@{revision}" if revision else name
    reachable = hub_reachable()
    for patterns in HUB_PATTERNS:
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=[CONFIG, *TOKENIZER, *patterns],
                local_files_only=not reachable,
            )
        except (
            Exception
        ) as failure:  # the library's errors, its HTTP library's, OSError, ValueError, ...
            raise UserError(
                f"{what}, but {called} is not a file or folder here and could not be loaded from "
                f"the Hugging Face hub ({_hub_reason(failure, reachable)}): give a file or folder, "
                "or a name on the hub with network access"
            ) from failure
        if any(Path(folder, pattern).is_file() for pattern in patterns):
            return Path(folder)
    raise UserError(
        f"{what}, but neither model.safetensors nor pytorch_model.bin of {called} was found on the "
        "Hugging Face hub, or, without network access, in its local cache: give the path of the "
        "weight file it has"
    )


def _hub_reason(failure: Exception, reachable: bool) -> str:
    from huggingface_hub import constants, errors

    for kind, reason in (
        (errors.GatedRepoError, "access needs its owner's approval: log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the name does not exist or is private"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.HFValidationError, "this is not a valid name there"),
    ):
        if isinstance(failure, kind):
            return reason
    if isinstance(failure, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and it is not in the cache"
        if not reachable:
            return "there is no network, and it is not in the cache"
    return first_line(failure).removeprefix("Got: ")


def _chosen(folder: Path) -> Path:
    """The weight file, or index of shards, to read from a folder."""
    for name in CHOICE:
        if (folder / name).is_file():
            return folder / name
    suffixes = (SAFETENSORS, *TORCH)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not found:
        raise Unreadable(f"holds no weight file ({', '.join(suffixes)}): {_GIVE}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Unreadable(f"holds several weight files ({names}{more}): give the path of one")
    return found[0]


def _read_file(path: Path, what: str) -> dict[str, np.ndarray]:
    return _undistributed(_read_tensors(path, what))


def _read_shards(index: Path, what: str) -> dict[str, np.ndarray]:
    """The tensors of all files in an index."""
    shard_of = _read_json(index, what).get("weight_map")
    with _reading(index, what):
        if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
            raise Unreadable("has no weight_map of tensors to files: download it again")
        shards = sorted(set(shard_of.values()))
        for shard in shards:
            if shard != Path(shard).name or not (index.parent / shard).is_file():
                raise Unreadable(f"names {shard}, which is not beside it: download that file too")
    arrays: dict[str, np.ndarray] = {}
    for shard in shards:
        arrays.update(_read_tensors(index.parent / shard, what))
    with _reading(index, what):
        for name, shard in shard_of.items():
            if name not in arrays:
                raise Unreadable(f"lists {name}, which is not in {shard}: download both again")
    return arrays


def _read_tensors(path: Path, what: str) -> dict[str, np.ndarray]:
    with _reading(path, what):
        _refuse_placeholder(path)
        suffix = path.suffix.lower()
        if suffix == SAFETENSORS:
            return _read_safetensors(path)
        if suffix in TORCH:
            return read_torch(path)
        raise Unreadable(f"does not end with {SAFETENSORS}, {', '.join(TORCH)}: {_GIVE}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if kind not in _READ_TYPES:
                    raise Unreadable(
                        f"holds {name} as {kind}, which is not supported: convert it to float32"
                    )
                if kind == "BF16":  # NumPy has no bfloat16
                    arrays[name] = _read_bfloat16(path, name)
                else:
                    array = file.get_tensor(name)
                    arrays[name] = array.astype(np.float32) if kind == "F16" else array
    except Unreadable:
        raise
    except Exception as failure:  # the library's own errors derive from Exception alone
        why = first_line(failure)
        raise Unreadable(f"is damaged or cut short ({why}): download it again") from failure
    return arrays


def _read_bfloat16(path: Path, name: str) -> Float32[np.ndarray, "..."]:
    """One tensor of a safetensors file: eight bytes of length, a JSON header of that length, the
    numbers.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        return float32_of(np.fromfile(file, "<u2", (end - start) // 2)).reshape(entry["shape"])


def _undistributed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays without the `module.` that DistributedDataParallel puts before every name."""
    if not all(name.startswith("module.") for name in arrays):
        return arrays
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    with _reading(path, what):
        _refuse_placeholder(path)
        try:
            content = parse_json(path.read_bytes())
        except ValueError as failure:
            raise Unreadable(f"is not JSON ({first_line(failure)}): download it again") from failure
        if not isinstance(content, dict):
            raise Unreadable("is JSON but not an object: download it again")
        return content


def _refuse_placeholder(path: Path) -> None:
    """Raises Unreadable if the file is what a failed download leaves behind."""
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        raise Unreadable("is empty: download it again")
    if text.startswith(b"version https://git-lfs"):
        raise Unreadable(
            "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise Unreadable("is a web page: download the file itself")


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns errors inside into UserError about `path`, beginning with `what`."""
    try:
        yield
    except Unreadable as failure:
        raise UserError(f"{what}, but {path} {failure}") from failure
    except OSError as failure:
        why = failure.strerror or first_line(failure)
        raise UserError(f"{what}, but {path} cannot be read ({why}): fix that, or {_GIVE}") from (
            failure
        )
