"""Matrix products. Picks between the portable kernel (gemm_mma.cuh) and, on sm_90a, TMA and wgmma (gemm_wgmma.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Context,
    Functor,
    I64s,
    Instruction,
    Launch,
    LevelSizes,
    Pointer,
    TensorMap,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR, operand, operands, space
from engine.targets.cuda.tiles import MmaTile, Operands, WgmmaTile, pick_mma, pick_wgmma

Tile = MmaTile | WgmmaTile


_MATRIX_TYPES = (DType.F16, DType.BF16, DType.F32)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Operands need one of their last two axes contiguous; weights are packed, whatever their layout."""
    assert isinstance(op, Gemm)
    a, b = inputs[0], inputs[1]
    if a.dtype is not b.dtype or a.dtype not in _MATRIX_TYPES:
        raise UnsupportedOp(f"Gemm of {a.dtype.value} and {b.dtype.value}: no CUDA kernel")
    b_need = Requirement() if _is_weight(b) else _inner(b, b.strides[-2] == 1 and b.strides[-1] != 1)
    output = len(op.infer(inputs)[0][1])
    return (
        (_inner(a, _rows_inner(a)), b_need, *(Requirement() for _ in inputs[2:])),
        tuple(Requirement(Access.INNER, tuple(range(output))) for _ in op.stores),
    )


def _inner(matrices: Tensor, rows: bool) -> Requirement:
    """Neighbours along the last axis, or along the `rows`."""
    *lead, row, column = range(len(matrices.shape))
    return Requirement(Access.INNER, (*lead, column, row) if rows else (*lead, row, column))


def _rows_inner(a: Tensor) -> bool:
    """Whether the rows of a are neighbours, not its columns."""
    return a.shape[-2] > 1 and a.strides[-2] == 1 and a.shape[-1] > 1 and a.strides[-1] != 1


def _is_weight(b: Tensor) -> bool:
    return is_constant(b) and prod(b.shape[:-2]) == 1


@dataclass(frozen=True, eq=False)
class Matrix:
    """An operand in memory: lines of neighbouring elements, `stride` elements apart. With `k_inner` a line is a row of
    a or a column of b, else all rows (columns) at one k. `batch`: strides along the batch axes of the product.
    `padded`: zeros follow every line, up to 16 bytes."""

    pointer: Pointer
    stride: int
    k_inner: bool = True
    batch: tuple[int, ...] = ()
    padded: bool = False

    def access(self, line: int, itemsize: int) -> int:
        """The bytes that can be read at once, of lines of so many elements: 16, 4, or an element."""
        counts = (*(() if self.padded else (line,)), self.stride, *self.batch)
        places = [self.pointer.offset, *(count * itemsize for count in counts)]
        return next((width for width in (16, 4) if all(place % width == 0 for place in places)), itemsize)


@dataclass(frozen=True, eq=False)
class Product:
    """A batch of products of matrices a [m, k] and b [k, n] of `dtype`; `batch` gives the sizes of its axes, outermost
    first. Also what a 1×1 convolution is."""

    m: int
    n: int
    k: int
    dtype: DType
    a: Matrix
    b: Matrix
    batch: tuple[int, ...] = ()

    @property
    def a_access(self) -> int:
        """The bytes that can be read at once along a's lines."""
        return self.a.access(self.k if self.a.k_inner else self.m, self.dtype.itemsize)

    @property
    def b_access(self) -> int:
        """The bytes that can be read at once along b's lines."""
        return self.b.access(self.k if self.b.k_inner else self.n, self.dtype.itemsize)

    @property
    def suits_tma(self) -> bool:
        """Whether the copy engine can read both operands as single matrices of 16-bit elements."""
        single = prod(self.batch) == 1 and self.a.k_inner and self.b.k_inner and self.dtype is DType.F16
        return single and min(self.a_access, self.b_access) == 16 and min(self.k, self.a.stride, self.b.stride) > 0


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Gemm)
    product = product_of(step, context)
    epilogue = epilogue_of(step, step.op.stores, tuple(range(len(step.outputs[0].shape))), product.n)
    return [launch_product(product, epilogue, pick_tile(product, context), context)]


def epilogue_of(
    step: Step, stores: Sequence[ex.Expr], order: Sequence[int], granularity: int, acc: DType = DType.F32
) -> Functor:
    """The epilogue of a matrix-like step: columns are the last axis of `order`, rows the others. `granularity` divides
    every column at which the kernel starts or ends. `acc`: the type of the sums."""
    shape = step.outputs[0].shape
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    every = space(shape, order[:-1], order[-1:], [*reads.values(), *writes])
    placed = dict(zip(reads, every.operands, strict=False))
    return codegen.epilogue(stores, every, placed, every.operands[len(reads) :], granularity, acc)


def product_of(step: Step, context: Context) -> Product:
    """The operands of a Gemm as matrices: leading axes along which only a moves join its rows where they lie together,
    the others are a batch."""
    a, b = step.inputs[0], step.inputs[1]
    k, n = b.shape[-2], b.shape[-1]
    shape = step.outputs[0].shape[:-1]
    rank = len(shape)
    # Rows of a, and b as if it were broadcast along them.
    moving_a = operand(Tensor(a.buffer, a.dtype, a.shape[:-1], a.strides[:-1]), rank)
    moving_b = operand(Tensor(b.buffer, b.dtype, (*b.shape[:-2], 1), (*b.strides[:-2], 0)), rank)
    rows = space(shape, range(rank), (), [moving_a, moving_b])
    sizes, (a_strides, b_strides) = rows.levels, (along.strides[:-1] for along in rows.operands)
    if b_strides[-1]:  # matrices of a single row
        sizes, a_strides, b_strides = (*sizes, 1), (*a_strides, 0), (*b_strides, 0)
    line = ceildiv(k, VECTOR) * VECTOR  # the distance to a second row where there is none: any will do
    if _rows_inner(a):
        a_matrix = Matrix(pointer_to(a), a.strides[-1], False, a_strides[:-1])
    else:
        a_matrix = Matrix(pointer_to(a), a_strides[-1] if sizes[-1] > 1 else line, True, a_strides[:-1])
    return Product(sizes[-1], n, k, a.dtype, a_matrix, _second(b, b_strides[:-1], context), sizes[:-1])


def _second(b: Tensor, batch: tuple[int, ...], context: Context) -> Matrix:
    """The second operand. A weight is packed with k innermost."""
    if _is_weight(b):
        packed = context.weights.packed(b, "n,k16B", pack_weight)
        return Matrix(Pointer(packed, ctype=STORAGE[b.dtype]), _padded(b.shape[-2], b.dtype), True, batch, padded=True)
    k_inner = b.strides[-2] == 1 and (b.strides[-1] != 1 or (b.shape[-2] > 1 and b.shape[-1] == 1))
    return Matrix(pointer_to(b), b.strides[-1 if k_inner else -2], k_inner, batch)


def pack_weight(b: np.ndarray) -> np.ndarray:
    """[…, k, n] → [n, k] with k padded to whole 16-byte chunks."""
    k, n = b.shape[-2:]
    packed = np.zeros((n, _padded(k, DType.of(b.dtype))), b.dtype)
    packed[:, :k] = b.reshape(k, n).T
    return packed


def _padded(k: int, dtype: DType) -> int:
    """k in whole 16-byte chunks."""
    chunk = 16 // dtype.itemsize
    return ceildiv(k, chunk) * chunk


def pick_tile(product: Product, context: Context) -> Tile:
    if context.architecture.wgmma and product.suits_tma:
        return pick_wgmma(product.m, product.n, product.k, context.multiprocessors)
    return pick_mma(
        product.m, product.n, product.k, prod(product.batch), context.architecture, context.multiprocessors,
        operands_of(product.dtype, context),
    )  # fmt: skip


def operands_of(dtype: DType, context: Context) -> Operands:
    """How the matrix units take operands of `dtype`."""
    return Operands.HALF if dtype.itemsize == 2 else Operands.TF32 if context.tf32 else Operands.EXACT


def launch_product(product: Product, epilogue: Functor, tile: Tile, context: Context) -> Launch:
    """The launch of a product in the given tile."""
    sizes = {"m": product.m, "n": product.n, "k": product.k}
    if isinstance(tile, WgmmaTile):
        return _launch_wgmma(product, epilogue, tile, sizes, context.multiprocessors)
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n)
    levels = 1 if prod(product.batch) == 1 else 2 if len(product.batch) <= 2 else 4
    missing = (0,) * (levels - len(product.batch))
    return launch(
        "gemm",
        "gemm_mma.cuh",
        {
            **tile.config(operands_of(product.dtype, context)), "operand": STORAGE[product.dtype],
            "a_access": product.a_access, "a_k_inner": product.a.k_inner,
            "b_access": product.b_access, "b_k_inner": product.b.k_inner, "batch_levels": levels,
        },
        [epilogue],
        {
            "a": product.a.pointer, "a_stride": I64(product.a.stride),
            "a_batch": I64s((*missing, *product.a.batch)[-levels:]),
            "b": product.b.pointer, "b_stride": I64(product.b.stride),
            "b_batch": I64s((*missing, *product.b.batch)[-levels:]),
            **sizes, "batch": LevelSizes((1,) * len(missing) + product.batch),
        },
        (tiles * prod(product.batch), 1, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip


def _launch_wgmma(
    product: Product, epilogue: Functor, tile: WgmmaTile, sizes: dict[str, int], multiprocessors: int
) -> Launch:
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n)
    return launch(
        "gemm",
        "gemm_wgmma.cuh",
        tile.config,
        [epilogue],
        {
            "map_a": TensorMap(product.a.pointer, product.m, product.k, product.a.stride, tile.m, 64),
            "map_b": TensorMap(product.b.pointer, product.n, product.k, product.b.stride, tile.n, 64),
            **sizes,
        },
        (min(tiles, multiprocessors), 1, 1),  # persistent: a block for every multiprocessor
        384,
        tile.shared_bytes,
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.n)}',
    )


def wgmma_function(n: int) -> str:
    """`wgmma<n>`: d (64 × n, fp32) = a · bᵀ, plus d itself where `accumulate` is not 0. Operands are descriptors."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        "template <int N> DEVICE void wgmma(float (&d)[N / 2], u64 a, u64 b, u32 accumulate);\n"
        f"template <> DEVICE void wgmma<{n}>(float (&d)[{count}], u64 a, u64 b, u32 accumulate) {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'               "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{registers}}}, %{count}, %{count + 1}, '
        'p, 1, 1, 0, 0;\\n}"\n'
        f'               : {operands} : "l"(a), "l"(b), "r"(accumulate));\n}}\n'
    )
