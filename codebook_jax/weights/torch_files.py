"""Files of torch.save, read by torch with `weights_only`: it then runs no code in them."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import numpy as np

LEAST = "2.6"  # older ones run code in a file even with weights_only (CVE-2025-32434)
NESTED = ("model", "state_dict", "module", "model_state")  # where training scripts put the weights
_MOST_NESTED = 4  # a pickle can contain itself
_SCALAR = np.float64(0).__reduce__()[0]  # the function that makes NumPy's numbers from a pickle
_HARMLESS = [  # what training scripts save beside the weights, under its names in old and new files
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]
_ADVICE = (
    f"pip install 'torch>={LEAST}', or load it where PyTorch is and save its state_dict with "
    "safetensors.torch.save_file"
)


class Unreadable(Exception):
    """What is wrong with weights and what to do: a sentence that begins with the file's name."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file's state dict: float16 and bfloat16 as float32, others unchanged.

    An optimizer's tensors are not read. Arrays may be views of the file. Raises Unreadable.
    """
    torch = _torch(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # older files cannot be mapped
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as failure:  # whatever torch, pickle and zipfile raise for a damaged file
        refused = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(failure))
        if isinstance(failure, pickle.UnpicklingError) and refused:
            raise Unreadable(
                f"{path} asks for {refused[1]}, which weights do not need and which could run any "
                "code: if you trust it, load it with torch and save its state_dict as .safetensors"
            ) from failure
        why = first_line(str(failure).rpartition("WeightsUnpickler error: ")[2] or failure)
        raise Unreadable(
            f"{path} is damaged, or not a state_dict that torch.save wrote ({why}): download it "
            "again, or save its state_dict as .safetensors"
        ) from failure
    tensors = _state_dict(content, torch)
    if tensors is None:
        raise Unreadable(
            f"{path} holds no dict of tensors, neither at the top nor under {', '.join(NESTED)}: "
            "give a file with a state_dict"
        )
    arrays = {}
    for name, tensor in tensors.items():
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        try:
            arrays[name] = (tensor.float() if is_half else tensor).detach().numpy()
        except (TypeError, RuntimeError) as failure:
            raise Unreadable(
                f"{path} holds {name} as {tensor.dtype}: convert it to float32 with torch"
            ) from failure
    return arrays


def first_line(failure: object) -> str:
    """A library's error message, shortened and without its full stop."""
    text = str(failure).strip().split("\n")[0].strip().rstrip(".") or type(failure).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _torch(path: Path) -> ModuleType:
    """The torch module; raises Unreadable if it is missing or too old to be safe."""
    try:
        import torch  # an extra of its own: other formats do not need it
    except (ImportError, OSError) as failure:  # OSError: one of its libraries is missing
        raise Unreadable(
            f"{path} needs PyTorch, which cannot be imported ({first_line(failure)}): {_ADVICE}"
        ) from failure
    number = [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]]
    if number < [int(part) for part in LEAST.split(".")]:
        raise Unreadable(
            f"{path} needs PyTorch {LEAST} or newer, but {torch.__version__} is installed, in "
            f"which a file can run code (CVE-2025-32434): {_ADVICE}"
        )
    return torch


def _state_dict(content: Any, torch: ModuleType, levels: int = _MOST_NESTED) -> dict | None:
    """The tensors of the innermost dict that has some; None if there are none."""
    if not isinstance(content, dict) or not levels:
        return None
    for key in NESTED:
        if found := _state_dict(content.get(key), torch, levels - 1):
            return found
    named = ((name, value) for name, value in content.items() if isinstance(name, str))
    return {name: value for name, value in named if torch.is_tensor(value)} or None
