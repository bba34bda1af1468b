"""What the tests of the attention kernels make their cases with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major

ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-10, "f32": 2.0**-21}
"""Relative error of a product's operands: half a unit in the last place, for tf32 with room for 7 standard deviations
of a sum (test_gemm.py derives it); of split fp32 operands what they keep (Ootomo & Yokota 2022)."""


def operand(rng: np.random.Generator, number: int, dtype: DType, shape: tuple[int, ...], odd: bool = False) -> Tensor:
    """A strided operand: features innermost, the other axes in any order, with gaps between rows. `odd`: it starts and
    strides anywhere."""
    step = 1 if odd else 8
    order = [int(axis) for axis in rng.permutation(len(shape) - 1)]
    gap, offset = (step * int(rng.integers(0, 3)) for _ in range(2))
    wide = (*shape[:-1], -(-shape[-1] // step) * step + gap)
    buffer = Buffer(f"input{number}", BufferKind.INPUT, (int(np.prod(wide)) + offset) * dtype.itemsize)
    return Tensor(buffer, dtype, shape, row_major(wide, (*order, len(shape) - 1)), offset)


def result(rng: np.random.Generator, step: Step) -> Step:
    """The same step with its results laid out in a random order of axes."""
    outputs = []
    for tensor in step.outputs:
        order = tuple(int(axis) for axis in rng.permutation(len(tensor.shape)))
        outputs.append(replace(tensor, strides=row_major(tensor.shape, order)))
    return replace(step, outputs=tuple(outputs))
