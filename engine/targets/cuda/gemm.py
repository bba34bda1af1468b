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
    Context,
    Functor,
    I64s,
    Instruction,
    Launch,
    Pointer,
    TensorMap,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR, operand, operands, space
from engine.targets.cuda.tiles import MmaTile, WgmmaTile, pick_mma, pick_wgmma

Tile = MmaTile | WgmmaTile


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Operands need one of their last two axes contiguous (a: k); weights are packed, whatever their layout."""
    assert isinstance(op, Gemm)
    a, b = inputs[0], inputs[1]
    if a.dtype is not DType.F16 or b.dtype is not DType.F16:
        raise UnsupportedOp(
            f"Gemm of {a.dtype.value} and {b.dtype.value}: the CUDA kernels take f16 (precision='fp16')"
        )
    rank = len(b.shape)
    k_inner = b.strides[-2] == 1 and b.strides[-1] != 1
    order = (*range(rank - 2), rank - 1, rank - 2) if k_inner else tuple(range(rank))
    b_need = Requirement() if _is_weight(b) else Requirement(Access.INNER, order)
    output = len(op.infer(inputs)[0][1])
    return (
        (Requirement(Access.INNER, tuple(range(len(a.shape)))), b_need, *(Requirement() for _ in inputs[2:])),
        tuple(Requirement(Access.INNER, tuple(range(output))) for _ in op.stores),
    )


def _is_weight(b: Tensor) -> bool:
    return is_constant(b) and prod(b.shape[:-2]) == 1


@dataclass(frozen=True, eq=False)
class Product:
    """A batch of products of matrices in memory. `b_k_inner`: b's rows in memory are columns of the product.

    Also what a 1×1 convolution is.
    """

    m: int
    n: int
    k: int
    a: Pointer
    a_stride: int
    b: Pointer
    b_stride: int
    b_k_inner: bool
    batch: tuple[int, int] = (1, 1)  # outer, inner
    a_batch: tuple[int, int] = (0, 0)  # strides of the same, in elements
    b_batch: tuple[int, int] = (0, 0)

    @property
    def a_vector(self) -> bool:
        """Whether a's rows can be read in 16-byte chunks."""
        return _chunked(self.a, self.k, self.a_stride, *self.a_batch)

    @property
    def b_vector(self) -> bool:
        return _chunked(self.b, self.k if self.b_k_inner else self.n, self.b_stride, *self.b_batch)

    @property
    def suits_tma(self) -> bool:
        """Whether the copy engine can read both operands as single matrices."""
        return self.batch == (1, 1) and self.a_vector and self.b_vector and self.b_k_inner


def _chunked(pointer: Pointer, *counts: int) -> bool:
    return pointer.offset % (2 * VECTOR) == 0 and all(count % VECTOR == 0 for count in counts)


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Gemm)
    product = product_of(step, context)
    epilogue = epilogue_of(step, step.op.stores, tuple(range(len(step.outputs[0].shape))), product.n)
    return [launch_product(product, epilogue, pick_tile(product, context), context)]


def epilogue_of(step: Step, stores: Sequence[ex.Expr], order: Sequence[int], granularity: int) -> Functor:
    """The epilogue of a matrix-like step: columns are the last axis of `order`, rows the others. `granularity` divides
    every column at which the kernel starts or ends."""
    shape = step.outputs[0].shape
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    every = space(shape, order[:-1], order[-1:], [*reads.values(), *writes])
    placed = dict(zip(reads, every.operands, strict=False))
    return codegen.epilogue(stores, every, placed, every.operands[len(reads) :], granularity)


def product_of(step: Step, context: Context) -> Product:
    """The operands of a Gemm as matrices: leading axes join the rows where they lie together, else they are a batch."""
    a, b = step.inputs[0], step.inputs[1]
    k, n = b.shape[-2], b.shape[-1]
    if _is_weight(b):
        packed = context.weights.packed(b, "n,k8", pack_weight)
        b_pointer, b_stride, b_k_inner = Pointer(packed), ceildiv(k, VECTOR) * VECTOR, True
    else:
        b_k_inner = b.strides[-2] == 1 and (b.strides[-1] != 1 or (k > 1 and n == 1))
        b_pointer, b_stride = pointer_to(b), b.strides[-1 if b_k_inner else -2]
    rows = space(a.shape, range(len(a.shape) - 1), (len(a.shape) - 1,), [operand(a, len(a.shape))])
    if prod(b.shape[:-2]) == 1 and len(rows.levels) == 1:
        stride = rows.operands[0].strides[0] or ceildiv(k, VECTOR) * VECTOR  # a single row: any stride will do
        return Product(rows.rows, n, k, pointer_to(a), stride, b_pointer, b_stride, b_k_inner)
    lead = step.outputs[0].shape[:-2]
    rank = len(lead)
    # The two last axes as if broadcast: only the leading ones take part.
    batch_a = operand(Tensor(a.buffer, a.dtype, a.shape[:-2], a.strides[:-2]), rank)
    batch_b = operand(Tensor(b.buffer, b.dtype, b.shape[:-2], b.strides[:-2]), rank)
    batch = space(lead, range(rank), (), [batch_a, batch_b])
    if len(batch.levels) > 2:
        raise UnsupportedOp(f"{step.name}: the batch axes of a product of shape {step.outputs[0].shape} do not merge")
    outer, inner = (1, *batch.levels)[-2:]
    strides = [(0, *operand.strides[:-1]) for operand in batch.operands]
    return Product(
        a.shape[-2], n, k, pointer_to(a), a.strides[-2], b_pointer, b_stride, b_k_inner, (outer, inner),
        (strides[0][-2], strides[0][-1]), (strides[1][-2], strides[1][-1]),
    )  # fmt: skip


def pack_weight(b: np.ndarray) -> np.ndarray:
    """[…, k, n] → [n, k] with k padded to whole 16-byte chunks."""
    k, n = b.shape[-2:]
    packed = np.zeros((n, ceildiv(k, VECTOR) * VECTOR), np.float16)
    packed[:, :k] = b.reshape(k, n).T
    return packed


def pick_tile(product: Product, context: Context) -> Tile:
    if context.architecture.wgmma and product.suits_tma:
        return pick_wgmma(product.m, product.n, product.k, context.multiprocessors)
    return pick_mma(product.m, product.n, product.k, prod(product.batch), context.architecture, context.multiprocessors)


def launch_product(product: Product, epilogue: Functor, tile: Tile, context: Context) -> Launch:
    """The launch of a product in the given tile."""
    sizes = {"m": product.m, "n": product.n, "k": product.k}
    if isinstance(tile, WgmmaTile):
        return _launch_wgmma(product, epilogue, tile, sizes, context.multiprocessors)
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n)
    return launch(
        "gemm",
        "gemm_mma.cuh",
        {**tile.config, "a_vector": product.a_vector, "b_vector": product.b_vector, "b_k_inner": product.b_k_inner},
        [epilogue],
        {
            "a": product.a, "a_stride": I64(product.a_stride), "a_batch": I64s(product.a_batch),
            "b": product.b, "b_stride": I64(product.b_stride), "b_batch": I64s(product.b_batch),
            **sizes, "batch_inner": product.batch[1],
        },
        (tiles, prod(product.batch), 1),
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
            "map_a": TensorMap(product.a, product.m, product.k, product.a_stride, tile.m, 64),
            "map_b": TensorMap(product.b, product.n, product.k, product.b_stride, tile.n, 64),
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
