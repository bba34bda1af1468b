"""TensorProto → NumPy array, every storage form of ONNX, with all claims checked before anything is allocated.

The reader and the translator call `tensor_array` and `check_tensor`. Data stored in the file is shared, external data
is memory-mapped read-only; nothing is copied where it need not be.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engine.errors import ModelError, UnsupportedOp
from engine.ir.dtype import DType

Array = np.ndarray[Any, Any]
TensorProto = onnx.TensorProto

DTYPES: dict[int, DType] = {
    TensorProto.DOUBLE: DType.F64,
    TensorProto.FLOAT: DType.F32,
    TensorProto.FLOAT16: DType.F16,
    TensorProto.BFLOAT16: DType.BF16,
    TensorProto.FLOAT8E4M3FN: DType.F8E4M3,
    TensorProto.INT64: DType.I64,
    TensorProto.INT32: DType.I32,
    TensorProto.INT16: DType.I16,
    TensorProto.INT8: DType.I8,
    TensorProto.UINT64: DType.U64,
    TensorProto.UINT32: DType.U32,
    TensorProto.UINT16: DType.U16,
    TensorProto.UINT8: DType.U8,
    TensorProto.BOOL: DType.BOOL,
    TensorProto.STRING: DType.STRING,
}
PROTO_TYPES: dict[DType, int] = {dtype: number for number, dtype in DTYPES.items()}

_MAX_RANK = 32  # NumPy's own limit was 32 for decades; no model comes near
_MAX_BYTES = 2**46  # 64 TiB: beyond any file, below what overflows
_TYPED_FIELDS: dict[DType, str] = {
    DType.F64: "double_data",
    DType.F32: "float_data",
    DType.I64: "int64_data",
    DType.U64: "uint64_data",
    DType.U32: "uint64_data",
    DType.STRING: "string_data",
}  # all others: int32_data


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `label` for messages, `folders` in which its external data may lie (none for bytes)."""

    label: str
    folders: tuple[Path, ...] = ()


def dtype_of(number: int, what: str) -> DType:
    """The IR's element type for an ONNX data type number; `what` names the tensor in the error."""
    if number in DTYPES:
        return DTYPES[number]
    try:
        name = TensorProto.DataType.Name(number)
    except ValueError:
        raise ModelError(f"{what}: unknown element type {number}; the file is damaged or from a newer ONNX") from None
    if number == TensorProto.UNDEFINED:
        raise ModelError(f"{what}: the element type is not given; the file is damaged")
    raise UnsupportedOp(f"{what}: element type {name} is not supported; export with float32, float16, bfloat16 or int8")


def check_tensor(tensor: onnx.TensorProto, what: str) -> None:
    """Raises ModelError, or UnsupportedOp, for a tensor that cannot be: its dtype, its shape, the amount of its inline
    data."""
    dtype, shape = _described(tensor, what)
    if tensor.data_location != TensorProto.EXTERNAL:
        _check_inline(tensor, dtype, prod(shape), what)


def _described(tensor: onnx.TensorProto, what: str) -> tuple[DType, tuple[int, ...]]:
    """dtype and shape, once they are known to be possible."""
    dtype = dtype_of(tensor.data_type, what)
    shape = tuple(tensor.dims)
    if len(shape) > _MAX_RANK:
        raise ModelError(f"{what}: {len(shape)} dimensions; at most {_MAX_RANK} are allowed")
    if any(dim < 0 for dim in shape):
        raise ModelError(f"{what}: negative dimension in {list(shape)}; the file is damaged")
    if prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise ModelError(f"{what}: shape {list(shape)} claims {prod(shape) * dtype.itemsize:.3g} bytes")
    if tensor.HasField("segment"):
        raise UnsupportedOp(f"{what}: segmented tensors are not supported; save the model again with onnx.save")
    return dtype, shape


def _check_inline(tensor: onnx.TensorProto, dtype: DType, elements: int, what: str) -> None:
    if tensor.HasField("raw_data"):
        _raw(tensor, dtype, elements, what)
    elif len(getattr(tensor, _TYPED_FIELDS.get(dtype, "int32_data"))) != elements:
        raise _wrong_amount(tensor, dtype, elements, "elements", what)


def _raw(tensor: onnx.TensorProto, dtype: DType, elements: int, what: str) -> bytes:
    """The raw data, of the right size. Protobuf copies it, in half the time that `ByteSize` of the tensor takes."""
    if dtype is DType.STRING:
        raise ModelError(f"{what}: a string tensor cannot have raw data; the file is damaged")
    data: bytes = tensor.raw_data
    if len(data) != elements * dtype.itemsize:
        raise _wrong_amount(tensor, dtype, elements * dtype.itemsize, "bytes", what)
    return data


def _wrong_amount(tensor: onnx.TensorProto, dtype: DType, needed: int, unit: str, what: str) -> ModelError:
    return ModelError(
        f"{what}: shape {list(tensor.dims)} of {dtype.value} needs {needed} {unit} but the file has another number; "
        "the file is truncated or damaged"
    )


def tensor_array(tensor: onnx.TensorProto, source: Source, what: str) -> Array:
    """The content of `tensor`. Raises ModelError where it is damaged, UnsupportedOp for types without a DType."""
    dtype, shape = _described(tensor, what)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, dtype, shape, source, what)
    if tensor.HasField("raw_data"):
        return np.frombuffer(_raw(tensor, dtype, prod(shape), what), dtype=dtype.numpy).reshape(shape)
    _check_inline(tensor, dtype, prod(shape), what)
    return _typed(tensor, dtype).reshape(shape)


def _typed(tensor: onnx.TensorProto, dtype: DType) -> Array:
    data = getattr(tensor, _TYPED_FIELDS.get(dtype, "int32_data"))
    if dtype is DType.STRING:
        return np.array([text.decode("utf-8", "replace") for text in data], dtype=object)
    if dtype in {DType.F16, DType.BF16, DType.F8E4M3}:  # stored as the bit pattern in the low bits of an int32
        return np.array(data, np.int32).astype(f"u{dtype.itemsize}").view(dtype.numpy)
    return np.array(data, np.uint64 if "uint64" in _TYPED_FIELDS.get(dtype, "") else None).astype(dtype.numpy)


def _external(tensor: onnx.TensorProto, dtype: DType, shape: tuple[int, ...], source: Source, what: str) -> Array:
    if dtype is DType.STRING:
        raise ModelError(f"{what}: string tensors cannot be external data")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _external_path(entries.get("location", ""), source, what)
    needed = prod(shape) * dtype.itemsize
    offset = _number(entries, "offset", 0, what)
    length = _number(entries, "length", needed, what)
    if length != needed:
        raise ModelError(f"{what}: external data of {length} bytes for shape {list(shape)} of {dtype.value}: {needed}")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe must not block
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"{what}: external data {path.name!r} is not a regular file")
            if offset + needed > status.st_size:
                raise ModelError(
                    f"{what}: external data ends at byte {offset + needed} but {path.name!r} has {status.st_size}; "
                    "copy the whole data file next to the model"
                )
            if needed == 0:
                return np.zeros(shape, dtype.numpy)
            mapped = np.memmap(file, np.uint8, "r", offset, (needed,))
    except OSError as error:
        raise ModelError(f"{what}: external data {path.name!r} cannot be read: {error.strerror or error}") from error
    array = np.asarray(mapped).view(dtype.numpy).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _external_path(location: str, source: Source, what: str) -> Path:
    """The file meant, which must lie in a folder of the model once links and `..` are resolved."""
    if not location or "\0" in location:
        raise ModelError(f"{what}: external data without a usable location; the file is damaged")
    if not source.folders:
        raise ModelError(f"{what}: has external data, so the model must be given as a path, not as bytes")
    if not Path(location).is_absolute():
        for folder in source.folders:
            path = (folder / location).resolve()
            if any(path.is_relative_to(root.resolve()) for root in source.folders) and path.exists():
                return path
        if all((folder / location).resolve().is_relative_to(folder.resolve()) for folder in source.folders):
            raise ModelError(f"{what}: external data file {location!r} is missing; copy it next to the model")
    raise ModelError(f"{what}: external data {location!r} lies outside the model's folder; move it next to the model")


def _number(entries: dict[str, str], key: str, default: int, what: str) -> int:
    text = entries.get(key, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{what}: external data {key} {text!r} is not a number of bytes")
    return int(text)
