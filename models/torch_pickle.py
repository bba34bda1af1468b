"""Reader of PyTorch's legacy ``.pth`` files (before the zip format) that executes nothing from the file.

The file is four pickles (magic number, protocol, system facts, the object), a fifth with the storage keys in
order, and then each storage as an int64 element count and raw little-endian elements. The pickles may only
build plain containers, ``OrderedDict`` and tensors; any other global or opcode is an error, found before
anything is unpickled. Format: ``torch/serialization.py``, ``_legacy_save``.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import FormatError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 16 << 20
_MAX_MEMO = 1 << 20
_MAX_RANK = 16

_STORAGE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}

_OPCODES = frozenset(
    "PROTO MARK STOP GLOBAL BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID REDUCE BUILD NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS".split()
)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_state_dict(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Read a legacy checkpoint that holds a flat mapping from names to tensors.

    Returns read-only arrays that share memory with ``data``.

    Raises:
        FormatError: the file is not a legacy checkpoint, is cut short, holds anything but tensors, or a tensor
            reaches outside its storage.
    """
    if data[:4] == b"PK\x03\x04":
        raise FormatError("a zip-format .pth file: only the legacy format is read here")
    try:
        return _load(data)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError) as error:
        raise FormatError(f"not a legacy PyTorch checkpoint: {error}") from error
    except (pickle.UnpicklingError, struct.error) as error:
        raise FormatError(f"a damaged PyTorch checkpoint: {error}") from error


def _load(data: bytes) -> dict[str, npt.NDArray[Any]]:
    file = io.BytesIO(data)
    if _read_pickle(file) != _MAGIC:
        raise FormatError("not a legacy PyTorch checkpoint: the magic number is missing")
    protocol = _read_pickle(file)
    if protocol != _PROTOCOL:
        raise FormatError(f"checkpoint protocol {protocol!r} is not {_PROTOCOL}")
    system = _read_pickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FormatError("the checkpoint was not written by a little-endian machine")
    state = _read_pickle(file)
    if not isinstance(state, dict):
        raise FormatError(f"the checkpoint holds a {type(state).__name__}, not a mapping of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise FormatError(f"entry {name!r} of the checkpoint is a {type(value).__name__}, not a tensor")

    used = {tensor.storage.key: tensor.storage for tensor in state.values()}
    storages = _read_storages(data, file, used)
    return {name: _materialise(name, tensor, storages) for name, tensor in state.items()}


def _read_storages(data: bytes, file: io.BytesIO, used: Mapping[str, _Storage]) -> dict[str, npt.NDArray[Any]]:
    keys = _read_pickle(file)
    if not isinstance(keys, list):
        raise FormatError("the checkpoint's list of storages is missing")
    storages: dict[str, npt.NDArray[Any]] = {}
    position = file.tell()
    for key in keys:
        if key not in used:
            raise FormatError(f"storage {key!r} belongs to no tensor")
        storage = used[key]
        if position + 8 > len(data):
            raise FormatError(f"the checkpoint ends before storage {key!r}")
        (count,) = struct.unpack_from("<q", data, position)
        if count != storage.count:
            raise FormatError(f"storage {key!r} has {count} elements, its tensor says {storage.count}")
        position += 8
        end = position + count * storage.dtype.itemsize
        if end > len(data):
            raise FormatError(f"the checkpoint ends inside storage {key!r} ({len(data)} bytes, {end} needed)")
        storages[key] = np.frombuffer(data, storage.dtype, count, position)
        position = end
    return storages


def _materialise(name: str, tensor: _Tensor, storages: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if tensor.storage.key not in storages:
        raise FormatError(f"tensor {name!r} refers to storage {tensor.storage.key!r}, which the file does not hold")
    storage = storages[tensor.storage.key]
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, storage.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= storage.size:
        raise FormatError(f"tensor {name!r} reaches element {last} of a storage of {storage.size}")
    byte_strides = tuple(stride * storage.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, byte_strides, writeable=False)


def _read_pickle(file: io.BytesIO) -> object:
    """Unpickle the object at the file's position and leave the position behind it."""
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name not in _OPCODES:
            raise FormatError(f"pickle opcode {opcode.name} at byte {position} has no place in a checkpoint of tensors")
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > _MAX_MEMO:
            raise FormatError(f"pickle memo index {argument} at byte {position} is out of bounds")
        if position is not None and position - start > _MAX_PICKLE_BYTES:
            raise FormatError(f"a pickle in the checkpoint is longer than {_MAX_PICKLE_BYTES} bytes")
    end = file.tell()
    file.seek(start)
    value: object = _TensorUnpickler(io.BytesIO(file.read(end - start))).load()
    return value


class _TensorUnpickler(pickle.Unpickler):
    """Knows the few globals that a checkpoint of tensors needs, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise FormatError(f"the checkpoint asks for {module}.{name}, which is not a tensor; nothing was executed")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count, view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str) or view is not None:
            raise FormatError(f"an unknown persistent object in the checkpoint: {pid!r:.200}")
        if not _is_index(count):
            raise FormatError(f"storage {key!r} claims {count!r:.40} elements")
        return _Storage(key, dtype, count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_autograd: Any) -> _Tensor:
    """Stand-in for ``torch._utils._rebuild_tensor_v2``; the flags after ``strides`` are for autograd."""
    if not isinstance(storage, _Storage) or not _is_index(offset):
        raise FormatError("a tensor in the checkpoint has no storage or no valid offset")
    for extent in (shape, strides):
        if not isinstance(extent, tuple) or len(extent) > _MAX_RANK or not all(_is_index(item) for item in extent):
            raise FormatError(f"a tensor in the checkpoint has shape {shape!r:.80} and strides {strides!r:.80}")
    if len(shape) != len(strides):
        raise FormatError(f"a tensor in the checkpoint has {len(shape)} dimensions and {len(strides)} strides")
    return _Tensor(storage, offset, shape, strides)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
