"""Reads files written by torch.save, without torch and without running any code in them.

zip     since torch 1.6: an archive of data.pkl, byteorder, and data/KEY for each storage
stream  before: pickles of a magic number, a version, the machine, the content and the storages'
keys, then each storage
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt16

from codebook_jax.weights.unpickling import (
    DTYPES,
    UNREAD_BYTES,
    RestrictedUnpickler,
    Storage,
    Tensor,
    Unreadable,
)

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream
NESTED = (
    "model",
    "state_dict",
    "module",
    "model_state",
)  # keys under which training scripts keep the weights
MOST_NESTED = 4  # a pickle can contain itself


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file's state dict: float16 and bfloat16 as float32, others unchanged.

    An optimizer's tensors are not read. Arrays may be read-only, and share memory if they did in
    torch. Raises Unreadable.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            saved = _open_zip(file) if zipped else _open_stream(file)
            tensors = _state_dict(saved.content)
            if tensors is None:
                raise Unreadable(
                    f"holds no dict of tensors, neither at the top nor under {', '.join(NESTED)}: "
                    "give a file with a state_dict"
                )
            return _built(tensors, saved)
    except Unreadable:
        raise
    except Exception as failure:  # pickle and zipfile can raise anything
        why = first_line(failure)
        raise Unreadable(f"is damaged or cut short ({why}): download it again") from failure


def float32_of(bits: UInt16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """bfloat16 as float32: its bits are the upper half of float32's."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def first_line(failure: Exception) -> str:
    """A library's error message, shortened and without its full stop."""
    text = str(failure).strip().split("\n")[0].strip().rstrip(".") or type(failure).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


class _Saved(NamedTuple):
    """An open file: the unpickled content, and the bytes of a storage on demand."""

    content: Any
    bytes_of: Callable[[Storage], Any]
    byte_order: str  # "<" or ">"


def _open_zip(file: IO[bytes]) -> _Saved:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Unreadable(
            "is a zip archive without torch.save's data.pkl: give a file that torch.save wrote"
        )
    root = pickles[0].removesuffix("/data.pkl")
    if f"{root}/constants.pkl" in names:
        raise Unreadable(
            "is a TorchScript program: load it with torch and save its state_dict as .safetensors"
        )
    little = f"{root}/byteorder" not in names or archive.read(f"{root}/byteorder") == b"little"
    content = RestrictedUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
    return _Saved(
        content,
        bytes_of=lambda storage: archive.read(f"{root}/data/{storage.key}"),
        byte_order="<" if little else ">",
    )


def _open_stream(file: IO[bytes]) -> _Saved:
    try:
        magic = RestrictedUnpickler(file).load()
    except Unreadable:
        raise
    except Exception:  # as above
        magic = None
    if magic != MAGIC:
        raise Unreadable("is not what torch.save writes, or is damaged: download it again")
    protocol, machine = RestrictedUnpickler(file).load(), RestrictedUnpickler(file).load()
    if protocol != PROTOCOL:
        raise Unreadable(
            "was written by an unknown version of torch.save: save it again with a newer torch"
        )
    unpickler = RestrictedUnpickler(file)
    content = unpickler.load()
    keys = RestrictedUnpickler(file).load()
    little = machine["little_endian"]
    places = _places(file, keys, unpickler.storages, "little" if little else "big")

    def bytes_of(storage: Storage) -> np.ndarray:
        start, size = places[storage.key]
        file.seek(start)
        return np.fromfile(file, np.uint8, size)

    return _Saved(content, bytes_of, "<" if little else ">")


def _places(
    file: IO[bytes], keys: list[str], storages: dict[str, Storage], byte_order: str
) -> dict[str, tuple[int, int]]:
    """(start, size), in bytes, of each storage in the rest of a stream, where its count of numbers
    comes before them.
    """
    end = os.fstat(file.fileno()).st_size
    places = {}
    for key in keys:
        counted = file.read(8)
        size = int.from_bytes(counted, byte_order) * _item_bytes(storages[str(key)].dtype)
        start = file.tell()
        if len(counted) < 8 or start + size > end:
            raise pickle.UnpicklingError(f"it ends at {end:,} bytes")
        places[str(key)] = start, size
        file.seek(start + size)
    return places


def _item_bytes(dtype: str) -> int:
    return UNREAD_BYTES[dtype] if dtype in UNREAD_BYTES else DTYPES[dtype].itemsize


def _state_dict(content: Any, levels: int = MOST_NESTED) -> dict[str, Tensor] | None:
    """The tensors of the innermost dict that has some; None if there are none."""
    if not isinstance(content, dict) or not levels:
        return None
    for key in NESTED:
        found = _state_dict(content.get(key), levels - 1)
        if found:
            return found
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    return tensors or None


def _built(tensors: dict[str, Tensor], saved: _Saved) -> dict[str, np.ndarray]:
    """The arrays: views of the storages, each of which is read and converted once."""
    storages: dict[tuple[Storage, str], np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise Unreadable(
                f"holds {name} as {tensor.dtype}, which is not supported: convert it to float32 "
                "with torch"
            )
        place = tensor.storage, tensor.dtype
        if place not in storages:
            storages[place] = _numbers(saved, *place)
        arrays[name] = _strided(storages[place], tensor, name)
    return arrays


def _numbers(saved: _Saved, storage: Storage, dtype: str) -> np.ndarray:
    """A storage as a flat array in this machine's byte order."""
    raw = np.frombuffer(saved.bytes_of(storage), np.uint8)
    if storage.view is not None:
        start, count = (number * _item_bytes(storage.dtype) for number in storage.view)
        if start < 0 or count < 0 or start + count > len(raw):
            raise pickle.UnpicklingError("a view reaches beyond its storage")
        raw = raw[start : start + count]
    written = DTYPES[dtype].newbyteorder(saved.byte_order)
    numbers = raw.view(written).astype(DTYPES[dtype], copy=False)
    if dtype == "bool":
        return numbers != 0
    if dtype == "bfloat16":
        return float32_of(numbers)
    return numbers.astype(np.float32) if dtype == "float16" else numbers


def _strided(numbers: np.ndarray, tensor: Tensor, name: str) -> np.ndarray:
    """The tensor as a view of its storage; raises UnpicklingError if it would reach beyond."""
    places = (tensor.offset, *tensor.size, *tensor.stride)
    sound = len(tensor.size) == len(tensor.stride) and all(
        isinstance(place, int) and place >= 0 for place in places
    )
    if not sound:
        raise pickle.UnpicklingError(f"{name} has no proper shape")
    if math.prod(tensor.size) == 0:
        return np.empty(tensor.size, numbers.dtype)
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=True)
    )
    if last >= len(numbers):
        raise pickle.UnpicklingError(f"{name} reaches beyond its storage")
    strides = [stride * numbers.itemsize for stride in tensor.stride]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.size, strides)
