"""Element types of the IR, and how they map to NumPy. Used by every layer of the engine."""

from __future__ import annotations

from enum import Enum

import ml_dtypes
import numpy as np


class DType(Enum):
    """Element type of a tensor. The value is the name used in printed graphs and in kernel keys."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3"  # ONNX FLOAT8E4M3FN: 448 at most, no infinities, NaN
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U64 = "u64"
    U32 = "u32"
    U16 = "u16"
    U8 = "u8"
    BOOL = "bool"
    STRING = "string"

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype (``object`` for strings)."""
        return _NUMPY[self]

    @property
    def plain(self) -> np.dtype:
        """The NumPy dtype in which libraries that know no extension types hold the elements: of BF16 and F8E4M3 the
        bits."""
        return _BITS.get(self, _NUMPY[self])

    @property
    def itemsize(self) -> int:
        """Bytes per element in memory."""
        return _NUMPY[self].itemsize

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_int(self) -> bool:
        return self in _INTS

    @property
    def is_signed(self) -> bool:
        return self in _FLOATS or self in _SIGNED

    def convert(self, array: np.ndarray) -> np.ndarray:
        """`array` as elements of this type: what a cast of the IR does. Floats are rounded to nearest, ties to even;
        numbers beyond the range of F8E4M3, infinities among them, become its largest ones."""
        if self is DType.F8E4M3 and array.dtype != self.numpy:
            # Through fp32, as every target does; NaN stays.
            array = np.clip(np.asarray(array, np.float32), -LARGEST_F8E4M3, LARGEST_F8E4M3)
        return np.asarray(array).astype(self.numpy, copy=False)

    @classmethod
    def of(cls, dtype: np.dtype | type) -> DType:
        """The DType of a NumPy dtype. Raises KeyError for types the IR does not have."""
        return _FROM_NUMPY[np.dtype(dtype)]


LARGEST_F8E4M3 = 448.0

_FLOATS = frozenset({DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8E4M3})
_SIGNED = frozenset({DType.I64, DType.I32, DType.I16, DType.I8})
_INTS = _SIGNED | {DType.U64, DType.U32, DType.U16, DType.U8}
_NUMPY: dict[DType, np.dtype] = {
    DType.F64: np.dtype(np.float64),
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.I64: np.dtype(np.int64),
    DType.I32: np.dtype(np.int32),
    DType.I16: np.dtype(np.int16),
    DType.I8: np.dtype(np.int8),
    DType.U64: np.dtype(np.uint64),
    DType.U32: np.dtype(np.uint32),
    DType.U16: np.dtype(np.uint16),
    DType.U8: np.dtype(np.uint8),
    DType.BOOL: np.dtype(np.bool_),
    DType.STRING: np.dtype(object),
}
_BITS: dict[DType, np.dtype] = {DType.BF16: np.dtype(np.uint16), DType.F8E4M3: np.dtype(np.uint8)}
_FROM_NUMPY = {numpy: dtype for dtype, numpy in _NUMPY.items()}
