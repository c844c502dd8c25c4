"""What torch.save wrote, read without torch, and without running anything that is in the file.

zip     since torch 1.6: an archive of data.pkl, byteorder, and data/KEY for each storage
stream  before: pickles of a magic number, a version, the machine, the content and the storages' keys, then each storage
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt16

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream
NESTED = ("model", "state_dict", "module", "model_state")  # where training scripts keep the weights
MOST_NESTED = 4  # a pickle can hold itself

_DTYPES = {
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"int{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(np.uint16),  # its bits
    "bool": np.dtype(np.uint8),  # a byte that is neither 0 nor 1 is no NumPy bool
}
_UNREAD_BYTES = {  # types known well enough to step over
    **dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    **{"float8_e8m0fnu": 1, "qint32": 4, "complex32": 4, "complex64": 8, "complex128": 16},
}
_STORAGES = {  # torch's names, less "Storage"
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8"},
    **{"Byte": "uint8", "Bool": "bool", "Untyped": "uint8"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128", "QInt8": "qint8"},
    **{"QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
}
_TURNED = "a negated or conjugated view"


class Unreadable(Exception):
    """The end of a sentence that began with the file's name: what is wrong, and what to do."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file's state dict: float16 and bfloat16 as float32, all others as they are.

    Only they are read, not an optimizer's. They may be read-only, and may share memory where they did in torch.
    Raises Unreadable.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            saved = _open_zip(file) if zipped else _open_stream(file)
            tensors = _state_dict(saved.content)
            if tensors is None:
                raise Unreadable(
                    f"holds no dict of tensors, neither as a whole nor under {', '.join(NESTED)}: "
                    "give a file with a state_dict"
                )
            return _built(tensors, saved)
    except Unreadable:
        raise
    except Exception as failure:  # pickle and zipfile fail in every way there is
        why = first_line(failure)
        raise Unreadable(f"is damaged or cut short ({why}): download it again") from failure


def float32_of(bits: UInt16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """The numbers of bfloat16, whose bits are the upper half of float32's."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def first_line(failure: Exception) -> str:
    """A library's error, short and without its full stop."""
    text = str(failure).strip().split("\n")[0].strip().rstrip(".") or type(failure).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


class _Dtype(NamedTuple):
    """Stands for a type of numbers, and for the class of storages that hold them."""

    dtype: str


class _Storage(NamedTuple):
    """Where numbers lie in the file; a view is (start, count) within them."""

    key: str
    dtype: str
    view: tuple[int, int] | None


class _Tensor(NamedTuple):
    """A tensor of which nothing is read yet."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Saved(NamedTuple):
    """An open file: the unpickled content, and the bytes of a storage when they are wanted."""

    content: Any
    bytes_of: Callable[[_Storage], Any]
    byte_order: str  # "<" or ">"


# A pickle can set attributes of whatever it is given. Named tuples have none to set; the classes below take the
# state and drop it.
class _RebuildTensor(NamedTuple):
    """Stands for torch._utils._rebuild_tensor, and its versions 2 and 3."""

    version: int

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> _Tensor:
        # rest: requires_grad, hooks, in version 3 the type, and what else torch has to say of the tensor
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = rest[2].dtype if self.version == 3 else storage.dtype
        turned = any(rest[3 if self.version == 3 else 2 :])
        return _Tensor(storage, _TURNED if turned else dtype, offset, tuple(size), tuple(stride))


class _RebuildParameter(NamedTuple):
    """Stands for torch._utils._rebuild_parameter: a parameter is its tensor."""

    def __call__(self, tensor: Any, *rest: Any) -> Any:
        return tensor


class _Mapping(dict):
    """Stands for the dicts of the standard library."""

    __slots__ = ()

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items if isinstance(items, (list, dict)) else ())

    def __setstate__(self, state: Any) -> None:
        pass


class _Inert:
    """Stands for what is no tensor: it takes everything, keeps nothing and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_GLOBALS: dict[tuple[str, str], Any] = {
    **{("collections", name): _Mapping for name in ("OrderedDict", "defaultdict", "Counter")},
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(1),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(2),
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildTensor(3),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
    ("torch", "Size"): tuple,
    **{("torch", name): _Dtype(name) for name in (*_DTYPES, *_UNREAD_BYTES)},
    **{
        (module, f"{name}Storage"): _Dtype(dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGES.items()
    },
    **{
        (module, name): _Inert
        for modules, names in (
            ("torch", "device"),
            ("argparse", "Namespace"),
            ("builtins __builtin__", "set frozenset list dict int float bool str bytes complex"),
            ("_codecs", "encode"),  # bytes, as protocol 2 writes them
            ("numpy", "dtype ndarray"),
            ("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
            ("pathlib pathlib._local", "Path PosixPath WindowsPath PurePosixPath PureWindowsPath"),
        )
        for module in modules.split()
        for name in names.split()
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the parts of weights and refuses all else by name; `storages` are those it came across."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes where Python 3 has text
        self.storages: dict[str, _Storage] = {}
        self._file = file

    def load(self) -> Any:
        """The content; the file is then behind it."""
        start = self._file.tell()
        for opcode, argument, place in pickletools.genops(self._file):
            # A damaged number here makes the unpickler reserve that much memory; a sound one counts what came before.
            if "PUT" in opcode.name and argument > place - start:
                raise pickle.UnpicklingError("a place in its memo is out of bounds")
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        called = f"{module}.{name}"
        if not all(part.isidentifier() for part in called.split(".")):
            raise pickle.UnpicklingError("it is no pickle")  # but, as a rule, a text
        raise Unreadable(
            f"asks for {called[:160]}, which weights do not need and which may run any code, so the file is "
            "refused: if you trust it, load it with torch and save its state_dict as .safetensors"
        )

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, storage_type, key, _, _, *view = saved_id
        if kind != "storage" or not isinstance(storage_type, _Dtype):
            raise pickle.UnpicklingError("a storage of no known type")
        storage = self.storages.setdefault(str(key), _Storage(str(key), storage_type.dtype, None))
        if storage.dtype != storage_type.dtype:
            raise pickle.UnpicklingError("a storage of two types")
        if view and view[0] is not None:
            _, start, count = view[0]
            storage = storage._replace(view=(start, count))
        return storage


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
            "is a program of TorchScript: load it with torch and save its state_dict as .safetensors"
        )
    little = f"{root}/byteorder" not in names or archive.read(f"{root}/byteorder") == b"little"
    content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    return _Saved(
        content,
        bytes_of=lambda storage: archive.read(f"{root}/data/{storage.key}"),
        byte_order="<" if little else ">",
    )


def _open_stream(file: IO[bytes]) -> _Saved:
    try:
        magic = _Unpickler(file).load()
    except Unreadable:
        raise
    except Exception:  # as above
        magic = None
    if magic != MAGIC:
        raise Unreadable("is not what torch.save writes, or is damaged: download it again")
    protocol, machine = _Unpickler(file).load(), _Unpickler(file).load()
    if protocol != PROTOCOL:
        raise Unreadable(
            "is of an unknown version of torch.save's: save it again with a newer torch"
        )
    unpickler = _Unpickler(file)
    content = unpickler.load()
    keys = _Unpickler(file).load()
    little = machine["little_endian"]
    places = _places(file, keys, unpickler.storages, "little" if little else "big")

    def bytes_of(storage: _Storage) -> np.ndarray:
        start, size = places[storage.key]
        file.seek(start)
        return np.fromfile(file, np.uint8, size)

    return _Saved(content, bytes_of, "<" if little else ">")


def _places(
    file: IO[bytes], keys: list[str], storages: dict[str, _Storage], byte_order: str
) -> dict[str, tuple[int, int]]:
    """(start, size), in bytes, of each storage in the rest of a stream: its count of numbers, and they."""
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
    return _UNREAD_BYTES[dtype] if dtype in _UNREAD_BYTES else _DTYPES[dtype].itemsize


def _state_dict(content: Any, levels: int = MOST_NESTED) -> dict[str, _Tensor] | None:
    """The tensors of the innermost dict that has some; None where there is none."""
    if not isinstance(content, dict) or not levels:
        return None
    for key in NESTED:
        found = _state_dict(content.get(key), levels - 1)
        if found:
            return found
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, _Tensor)
    }
    return tensors or None


def _built(tensors: dict[str, _Tensor], saved: _Saved) -> dict[str, np.ndarray]:
    """The arrays: views of the storages, each of which is read and converted once."""
    storages: dict[tuple[_Storage, str], np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise Unreadable(
                f"holds {name} as {tensor.dtype}, which is not read here: convert it to float32 with torch"
            )
        place = tensor.storage, tensor.dtype
        if place not in storages:
            storages[place] = _numbers(saved, *place)
        arrays[name] = _strided(storages[place], tensor, name)
    return arrays


def _numbers(saved: _Saved, storage: _Storage, dtype: str) -> np.ndarray:
    """A storage as a flat array in this machine's byte order."""
    raw = np.frombuffer(saved.bytes_of(storage), np.uint8)
    if storage.view is not None:
        start, count = (number * _item_bytes(storage.dtype) for number in storage.view)
        if start < 0 or count < 0 or start + count > len(raw):
            raise pickle.UnpicklingError("a view reaches beyond its storage")
        raw = raw[start : start + count]
    written = _DTYPES[dtype].newbyteorder(saved.byte_order)
    numbers = raw.view(written).astype(_DTYPES[dtype], copy=False)
    if dtype == "bool":
        return numbers != 0
    if dtype == "bfloat16":
        return float32_of(numbers)
    return numbers.astype(np.float32) if dtype == "float16" else numbers


def _strided(numbers: np.ndarray, tensor: _Tensor, name: str) -> np.ndarray:
    """The tensor as a view of its storage; never of what lies beyond."""
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
