"""The operands of a product as matrices in memory: what the kernels of `gemm.py` are told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    I64s,
    LevelSizes,
    Pointer,
    WeightStore,
    ceildiv,
    is_constant,
    pointer_to,
)
from engine.targets.cuda.spaces import operand, space
from engine.targets.cuda.tiles import WgmmaTile


@dataclass(frozen=True, eq=False)
class Matrix:
    """An operand in memory: lines of neighbouring elements, `stride` elements apart. With `k_inner` a line is a row of
    a or a column of b, else all rows (columns) at one k. `padded`: zeros follow every line, up to 16 bytes."""

    pointer: Pointer
    stride: int
    k_inner: bool = True
    padded: bool = False

    @property
    def is_constant(self) -> bool:
        return self.pointer.buffer.kind is BufferKind.CONSTANT

    def access(self, line: int, batch: Sequence[int], itemsize: int) -> int:
        """The bytes that can be read at once of lines of so many elements, in matrices so far apart: 16, 4, or an
        element."""
        counts = (*(() if self.padded else (line,)), self.stride, *batch)
        places = [self.pointer.offset, *(count * itemsize for count in counts)]
        return next((width for width in (16, 4) if all(place % width == 0 for place in places)), itemsize)


@dataclass(frozen=True)
class Batch:
    """How products follow each other: the sizes of up to four axes, outermost first, and the strides of a and b along
    them."""

    sizes: tuple[int, ...] = ()
    a: tuple[int, ...] = ()
    b: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return prod(self.sizes)

    @property
    def levels(self) -> int:
        """The axes that a kernel is compiled for: few different numbers."""
        return 1 if self.count == 1 else 2 if len(self.sizes) <= 2 else 4

    def arguments(self) -> dict[str, Argument]:
        """What a kernel with so many levels is told."""

        def padded(numbers: tuple[int, ...], by: int) -> tuple[int, ...]:
            return ((by,) * self.levels + numbers)[-self.levels :]

        return {
            "batch": LevelSizes(padded(self.sizes, 1)),
            "a_batch": I64s(padded(self.a, 0)), "b_batch": I64s(padded(self.b, 0)),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Found:
    """1 / √(variance + `epsilon`) of each row of the `result`, found beside it and left at `factors`; at `offsets`, if
    they are asked for, the mean of each row times that. `short`: the result's epilogue leaves registers for moments."""

    result: Pointer
    factors: Pointer
    dtype: DType
    epsilon: float
    offsets: Pointer | None = None
    short: bool = True

    def arguments(self) -> dict[str, Argument]:
        """What a kernel that finds them is told (kernels/scheduler/row_moments.cuh)."""
        offsets: dict[str, Argument] = {} if self.offsets is None else {"result_offsets": self.offsets}
        return {"result_factors": self.factors, **offsets, "epsilon": self.epsilon}


_MOST_INTEGERS = (2**31 - 1) // 128**2
"""Products of two integers of 8 bits whose sum fits 32."""


@dataclass(frozen=True, eq=False)
class Product:
    """Products of matrices a [m, k] and b [k, n] of `dtype`. Also what a 1×1 convolution is."""

    m: int
    n: int
    k: int
    dtype: DType
    a: Matrix
    b: Matrix
    batch: Batch = Batch()
    in_parts: bool = False
    """Both operands are sums of two matrices of bf16, whose columns lie by turns (`in_parts`)."""
    divisors: Pointer | None = None
    """The factors of the rows of a, if these are divided by their deviations (row_factors.py)."""
    factors: Found | None = None
    """Those of the rows of the result, where they are asked for."""

    @property
    def a_access(self) -> int:
        """The bytes that can be read at once along a's lines."""
        return self.a.access(self.k if self.a.k_inner else self.m, self.batch.a, self.dtype.itemsize)

    @property
    def b_access(self) -> int:
        """The bytes that can be read at once along b's lines."""
        return self.b.access(self.k if self.b.k_inner else self.n, self.batch.b, self.dtype.itemsize)

    def found_in(self, tile: WgmmaTile) -> Found | None:
        """The factors of the result's rows, if a tile finds them: one with staged results, beside a short epilogue."""
        return self.factors if self.factors is not None and self.factors.short and tile.finds_moments else None

    @property
    def suits_wgmma(self) -> bool:
        """Whether its sums fit the accumulators: of integers 32 bits."""
        return self.dtype is not DType.I8 or self.k <= _MOST_INTEGERS

    @property
    def suits_tma(self) -> bool:
        """Whether the copy engine can read both operands as single matrices."""
        return self.suits_tma_aligned and self.a_access == 16

    @property
    def suits_tma_batched(self) -> bool:
        """Whether it can as several matrices, along two axes of the batch at most, or across b's lines."""
        several = self.batch.count > 1 or not self.b.k_inner
        lines = (self.a.stride, self.b.stride, self.k, *self.batch.sizes)
        narrow = self.dtype.itemsize == 2 or (self.dtype.itemsize == 1 and self.b.k_inner)  # b across: of 16 bits
        lies = self.suits_wgmma and self.a.k_inner and narrow and len(self.batch.sizes) <= 2 and min(lines) > 0
        return several and lies and self.a_access == self.b_access == 16

    @property
    def suits_tma_aligned(self) -> bool:
        """Whether it can where the rows of a have been copied to where it reads them (align_rows.py)."""
        single = self.suits_wgmma and self.batch.count == 1 and self.a.k_inner and self.b.k_inner
        return single and self.b_access == 16 and min(self.k, self.a.stride, self.b.stride) > 0


def product_of(step: Step, context: Context) -> Product:
    """The operands of a Gemm as matrices."""
    a, b = step.inputs[0], step.inputs[1]
    k, n = b.shape[-2], b.shape[-1]
    m, row, batch = rows_of(step)
    if rows_inner(a):
        return Product(m, n, k, a.dtype, Matrix(pointer_to(a), a.strides[-1], False), _second(b, context), batch)
    line = row if m > 1 else line_elements(k, a.dtype)  # to a second row where there is none: any will do
    return Product(m, n, k, a.dtype, Matrix(pointer_to(a), line), _second(b, context), batch)


def rows_of(step: Step) -> tuple[int, int, Batch]:
    """The rows of a, their stride, and the batch. A leading axis along which only a moves joins its rows where they lie
    together. Raises UnsupportedOp where the operands need more batch axes than there are."""
    a, b, (*lead, m) = step.inputs[0], step.inputs[1], step.outputs[0].shape[:-1]
    leads = [operand(Tensor(t.buffer, t.dtype, t.shape[:-2], t.strides[:-2]), len(lead)) for t in (a, b)]
    batch = space(lead, range(len(lead)), (), leads)
    sizes, (a_strides, b_strides) = batch.levels, (along.strides[:-1] for along in batch.operands)
    row = a.strides[-2] if m > 1 else 0
    if b_strides[-1] == 0 and (m == 1 or a_strides[-1] == m * row):
        row = row if m > 1 else a_strides[-1]
        return m * sizes[-1], row, Batch(sizes[:-1], a_strides[:-1], b_strides[:-1])
    return m, row, Batch(sizes, a_strides, b_strides)


def _second(b: Tensor, context: Context) -> Matrix:
    """The second operand. A weight is packed with k innermost."""
    if is_weight(b):
        packed = context.weights.packed(b, "n,k lines", pack_weight)
        return Matrix(Pointer(packed, ctype=STORAGE[b.dtype]), line_elements(b.shape[-2], b.dtype), padded=True)
    k_inner = b.dtype.itemsize == 1 or (
        b.strides[-2] == 1 and (b.strides[-1] != 1 or (b.shape[-2] > 1 and b.shape[-1] == 1))
    )
    return Matrix(pointer_to(b), b.strides[-1 if k_inner else -2], k_inner)


def pack_weight(b: np.ndarray) -> np.ndarray:
    """[…, k, n] → [n, k] with k padded to whole lines."""
    k, n = b.shape[-2:]
    packed = np.zeros((n, line_elements(k, DType.of(b.dtype))), b.dtype)
    packed[:, :k] = b.reshape(k, n).T
    return packed


PART_COLUMNS = 64
"""Columns of bf16 that a step of wgmma takes: as many of one part lie beside as many of the other."""
PART_STEPS = 3
"""Steps of wgmma for so many columns of operands in two parts."""


def columns_in_parts(k: int) -> int:
    """The columns of a matrix of k columns in two parts."""
    return 2 * ceildiv(k, PART_COLUMNS) * PART_COLUMNS


def in_parts(product: Product, weights: WeightStore) -> Product:
    """A product of fp32 whose a lies in two parts of bf16, with its constant b in two parts, too."""
    b, k, columns = product.b, product.k, columns_in_parts(product.k)
    tensor = Tensor(b.pointer.buffer, product.dtype, (product.n, k), (b.stride, 1), b.pointer.offset // 4)
    packed = Pointer(weights.packed(tensor, "n,k64,parts", split_weight), ctype=STORAGE[DType.BF16])
    return replace(product, dtype=DType.BF16, b=Matrix(packed, columns, padded=True), in_parts=True)


def split_weight(b: np.ndarray) -> np.ndarray:
    """fp32 [n, k] → bf16 [n, steps · 2 · 64]: of every 64 columns (the last padded with zeros) the nearest numbers, and
    then the nearest ones to what these leave."""
    n, k = b.shape
    padded = np.zeros((n, columns_in_parts(k) // 2), np.float32)
    padded[:, :k] = b
    with np.errstate(invalid="ignore", over="ignore"):
        big = padded.astype(DType.BF16.numpy)
        rest = padded - big.astype(np.float32)
        small = np.where(np.isfinite(rest), rest, np.float32(0)).astype(DType.BF16.numpy)
    both = np.stack([part.reshape(n, -1, PART_COLUMNS) for part in (big, small)], axis=2)
    return np.ascontiguousarray(both.reshape(n, -1))


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of 11 bits to fp32, halves away from zero as cvt.rna.tf32.f32 does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = np.where(np.isfinite(x), (bits + np.uint32(1 << 12)) & np.uint32(0xFFFF_E000), bits)
    return nearest.view(np.float32)


def line_elements(k: int, dtype: DType) -> int:
    """The elements from one row of k to the next such that the 128 bytes which the copy engine takes at once never lie
    in two lines of the cache: whole lines, or the next power of two of up to 64 bytes."""
    nbytes = max(16, k * dtype.itemsize)
    length = ceildiv(nbytes, 128) * 128 if nbytes > 64 else 1 << (nbytes - 1).bit_length()
    return length // dtype.itemsize


def rows_inner(a: Tensor) -> bool:
    """Whether the rows of a are neighbours, not its columns."""
    return a.shape[-2] > 1 and a.strides[-2] == 1 and a.shape[-1] > 1 and a.strides[-1] != 1


def is_weight(b: Tensor) -> bool:
    return is_constant(b) and prod(b.shape[:-2]) == 1
