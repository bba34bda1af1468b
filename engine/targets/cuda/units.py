"""Elements moved as they are, many at once: in units of up to 16 bytes. For kernels that only move data."""

from __future__ import annotations

from collections.abc import Iterable

from engine.ir.dtype import DType

UNITS = {16: "uint4", 8: "u64", 4: "u32", 2: "u16", 1: "u8"}
"""Types of kernels/types.cuh (and CUDA's own) by their bytes."""


def elements_in_unit(dtype: DType, numbers: Iterable[int]) -> int:
    """The elements of the largest unit in which a tensor can be moved. `numbers`, all in elements: the size and the
    offset of every run of neighbours, and all other strides."""
    every = list(numbers)
    counts = (nbytes // dtype.itemsize for nbytes in UNITS if nbytes > dtype.itemsize)
    return next((n for n in counts if all(number % n == 0 for number in every)), 1)
