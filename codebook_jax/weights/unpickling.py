"""Unpickles a pickle of torch.save without torch or running its code: tensors become
descriptions.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any, NamedTuple

import numpy as np

DTYPES = {
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"int{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(np.uint16),  # its bits
    "bool": np.dtype(np.uint8),  # NumPy's bool only allows the bytes 0 and 1
}
UNREAD_BYTES = {  # types that can be skipped: only their size is needed
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
    """What is wrong with a file and what to do; completes a sentence that begins with its name."""


class _Dtype(NamedTuple):
    """Stands for a number type, and for the class of storages of that type."""

    dtype: str


class Storage(NamedTuple):
    """The position of numbers in the file; a view is (start, count) within them."""

    key: str
    dtype: str
    view: tuple[int, int] | None


class Tensor(NamedTuple):
    """A tensor whose numbers are not read yet."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# A pickle can set attributes of any object it gets. Named tuples have none to set; the classes
# below take the state and drop it.
class _RebuildTensor(NamedTuple):
    """Stands for torch._utils._rebuild_tensor, and its versions 2 and 3."""

    version: int

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
        # rest: requires_grad, hooks, in version 3 the type, and other metadata
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        dtype = rest[2].dtype if self.version == 3 else storage.dtype
        turned = any(rest[3 if self.version == 3 else 2 :])
        return Tensor(storage, _TURNED if turned else dtype, offset, tuple(size), tuple(stride))


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
    """Stands for anything but a tensor: accepts everything, keeps nothing and does nothing."""

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
    **{("torch", name): _Dtype(name) for name in (*DTYPES, *UNREAD_BYTES)},
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


class RestrictedUnpickler(pickle.Unpickler):
    """Accepts the parts of weights and refuses anything else by name; `storages` are those it
    found.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes where Python 3 writes text
        self.storages: dict[str, Storage] = {}
        self._file = file

    def load(self) -> Any:
        """The content; leaves the file's position after it."""
        start = self._file.tell()
        for opcode, argument, place in pickletools.genops(self._file):
            # A damaged number here makes the unpickler reserve that much memory; a valid one counts
            # earlier entries.
            if "PUT" in opcode.name and argument > place - start:
                raise pickle.UnpicklingError("a place in its memo is out of bounds")
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        called = f"{module}.{name}"
        if not all(part.isidentifier() for part in called.split(".")):
            raise pickle.UnpicklingError("it is not a pickle")  # usually it is text
        raise Unreadable(
            f"asks for {called[:160]}, which weights do not need and which could run any code, so "
            "the file is refused: if you trust it, load it with torch and save its state_dict as "
            ".safetensors"
        )

    def persistent_load(self, saved_id: Any) -> Storage:
        kind, storage_type, key, _, _, *view = saved_id
        if kind != "storage" or not isinstance(storage_type, _Dtype):
            raise pickle.UnpicklingError("a storage of no known type")
        storage = self.storages.setdefault(str(key), Storage(str(key), storage_type.dtype, None))
        if storage.dtype != storage_type.dtype:
            raise pickle.UnpicklingError("a storage of two types")
        if view and view[0] is not None:
            _, start, count = view[0]
            storage = storage._replace(view=(start, count))
        return storage
