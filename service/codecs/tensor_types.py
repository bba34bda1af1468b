"""Datatypes of the Open Inference Protocol v2 and the dtypes behind them."""

from functools import cache
from typing import Any

import numpy as np

_NAMES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
}
BINARY_ONLY = ("FP16", "BF16")
"""Datatypes that JSON data cannot have."""


def has_datatype(dtype: np.dtype[Any]) -> bool:
    """Whether the protocol has a name for a dtype: it has none for floats of 8 bits."""
    return dtype.name in _NAMES


@cache
def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a dtype."""
    return _NAMES[dtype.name]
