"""Matrix products. Picks between the portable kernel (gemm_mma.cuh), on sm_90a TMA and wgmma (gemm_wgmma.cuh), slices
of rows where memory is the limit (gemm_stream.py), and, for types that the matrix units do not take, the ordinary units
(gemm_simt.cuh)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import codegen, product_cost
from engine.targets.cuda.align_rows import aligned, aligned_bytes
from engine.targets.cuda.choices import key_of, tile_of
from engine.targets.cuda.gemm_stream import (
    AnyTile,
    StreamTile,
    launch_stream,
    narrow_stream_tile,
    stream_tile,
    streams_faster,
)
from engine.targets.cuda.kernel import (
    ALIGNMENT,
    I64,
    STORAGE,
    Argument,
    Context,
    Functor,
    Instruction,
    Launch,
    Pointer,
    Reads,
    TensorMap,
    ceildiv,
    launch,
    pointer_to,
    workspace,
)
from engine.targets.cuda.product import Product, columns_in_parts, in_parts, is_weight, product_of, rows_inner, rows_of
from engine.targets.cuda.product_cost import (
    Ranked,
    Way,
    ranked_batched,
    ranked_mma,
    ranked_staged,
    ranked_stream,
    ranked_wgmma,
)
from engine.targets.cuda.spaces import VECTOR, operand, operands, space
from engine.targets.cuda.staging import STAGED_WIDTH, staged_epilogue
from engine.targets.cuda.tiles import NOTHING, Operands, WgmmaTile

_MATRIX_TYPES = (DType.F16, DType.BF16, DType.F32)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """On the matrix units operands need one of their last two axes contiguous; weights are packed, whatever their
    layout. Raises UnsupportedOp for strings."""
    assert isinstance(op, Gemm)
    a, b = inputs[0], inputs[1]
    if DType.STRING in (a.dtype, b.dtype):
        raise UnsupportedOp(f"Gemm of {a.dtype.value} and {b.dtype.value}")
    needs = (Requirement(), Requirement())
    if _on_matrix_units(op, a, b):
        b_need = Requirement() if is_weight(b) else _inner(b, b.strides[-2] == 1 and b.strides[-1] != 1)
        needs = (_inner(a, rows_inner(a)), b_need)
    output = len(op.infer(inputs)[0][1])
    return (
        (*needs, *(Requirement() for _ in inputs[2:])),
        tuple(Requirement(Access.INNER, tuple(range(output))) for _ in op.stores),
    )


def _on_matrix_units(op: Gemm, a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.dtype in _MATRIX_TYPES and codegen.COMPUTE[_accumulator(op)] == "float"


def _accumulator(op: Gemm) -> DType:
    """The type in which the expressions see the sum."""
    return next((leaf.dtype for leaf in ex.walk(*op.stores) if isinstance(leaf, ex.Acc)), DType.F32)


def _inner(matrices: Tensor, rows: bool) -> Requirement:
    """Neighbours along the last axis, or along the `rows`."""
    *lead, row, column = range(len(matrices.shape))
    return Requirement(Access.INNER, (*lead, column, row) if rows else (*lead, row, column))


def lower(step: Step, context: Context) -> list[Launch]:
    op, shape = step.op, step.outputs[0].shape
    assert isinstance(op, Gemm)
    parts = parts_of(step, context)
    if parts is None:
        accumulator = _accumulator(op)
        epilogue = epilogue_of(step, op.stores, tuple(range(len(shape))), shape[-1], accumulator)
        return [_launch_simt(step, epilogue, accumulator)]
    product, epilogue = parts
    return launches_of(product, epilogue, pick_tile(product, epilogue, context), context)


def parts_of(step: Step, context: Context) -> tuple[Product, Functor] | None:
    """The product and the epilogue of a step for the matrix units; None for others."""
    op, shape = step.op, step.outputs[0].shape
    if not isinstance(op, Gemm) or not _on_matrix_units(op, *step.inputs[:2]):
        return None
    return product_of(step, context), epilogue_of(
        step, op.stores, tuple(range(len(shape))), shape[-1], _accumulator(op)
    )


def epilogue_of(
    step: Step,
    stores: Sequence[ex.Expr],
    order: Sequence[int],
    granularity: int,
    accumulator: DType = DType.F32,
) -> Functor:
    """The epilogue of a matrix-like step: columns are the last axis of `order`, rows the others. `granularity` divides
    every column at which the kernel starts or ends."""
    shape = step.outputs[0].shape
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    every = space(shape, order[:-1], order[-1:], [*reads.values(), *writes])
    placed, results = dict(zip(reads, every.operands, strict=False)), every.operands[len(reads) :]
    functor = codegen.epilogue(stores, every, placed, results, granularity, accumulator)
    return replace(functor, stage=partial(staged_epilogue, stores, every, placed, results, granularity))


def pick_tile(product: Product, epilogue: Functor, context: Context) -> AnyTile:
    """The tile that was fastest on the device, where it has been timed; else what should be."""
    operands = operands_of(product, context)
    timed = context.choices.get(key_of(product, operands, epilogue)) if context.choices else None
    chosen = None if timed is None else tile_of(timed, product, operands)
    if chosen is not None and not (needs_staged(chosen) and epilogue.staged is None):
        return chosen
    best = ranked_tiles(product, context, epilogue.reads)[0]
    if product_cost.CHOSEN_BY_MODEL and not isinstance(best.tile, StreamTile):
        others = other_tiles(product, epilogue, context)
        rivals = (best, *(ranked for way in product_cost.CHOSEN_BY_MODEL for ranked in others[way][:1]))
        best = min(rivals, key=lambda ranked: ranked.estimate.cycles)
    return best.tile


def needs_staged(tile: AnyTile) -> bool:
    """Whether a tile is for epilogues that have a staged form."""
    return isinstance(tile, WgmmaTile) and tile.slots > 0


def ranked_tiles(product: Product, context: Context, reads: Reads = NOTHING) -> list[Ranked]:
    """The tiles that can take a product, with k in one part or in several, from what should be the fastest on."""
    operands, multiprocessors = operands_of(product, context), context.multiprocessors
    every = [*ranked_mma(product, operands, context.architecture, multiprocessors)]
    if context.architecture.wgmma and product.suits_tma_aligned and operands is not Operands.EXACT:
        every += ranked_wgmma(product, operands, multiprocessors, reads)
    every.sort(key=lambda ranked: ranked.estimate.cycles)
    slices = stream_tile(product, operands)
    if slices is not None:
        faster = streams_faster(product, slices, every[0].tile, operands, multiprocessors)
        every.insert(0 if faster else 1, ranked_stream(product, slices, operands, multiprocessors))
    return every


def other_tiles(product: Product, epilogue: Functor, context: Context) -> Mapping[Way, list[Ranked]]:
    """The tiles of every other way that can take a product, from what should be the fastest on."""
    operands, multiprocessors = operands_of(product, context), context.multiprocessors
    wgmma = context.architecture.wgmma
    every: dict[Way, list[Ranked]] = {way: [] for way in Way}
    if wgmma and product.suits_tma_aligned and operands is not Operands.EXACT and epilogue.staged is not None:
        every[Way.STAGED] += ranked_staged(product, operands, multiprocessors)
    if wgmma and product.suits_tma_batched:
        every[Way.BATCHED] += ranked_batched(product, operands, multiprocessors, epilogue.reads)
    slices = narrow_stream_tile(product, operands)
    if slices is not None:
        every[Way.NARROW].append(ranked_stream(product, slices, operands, multiprocessors))
    return {way: sorted(tiles, key=lambda ranked: ranked.estimate.cycles) for way, tiles in every.items()}


def operands_of(product: Product, context: Context) -> Operands:
    """How the matrix units take the operands. Constants of fp32 are never just rounded: their errors are the same in
    every row, so that what follows does not average them out."""
    if product.dtype.itemsize == 2:
        return Operands.HALF
    if not context.tf32:
        return Operands.EXACT
    return Operands.REFINED if product.b.is_constant else Operands.TF32


def launches_of(product: Product, epilogue: Functor, tile: AnyTile, context: Context) -> list[Launch]:
    """The launches of a product in the given tile."""
    if not (isinstance(tile, WgmmaTile) and tile.aligns):
        return [launch_product(product, epilogue, tile, context)]
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n)
    before = ceildiv(aligned_bytes(product), ALIGNMENT) * ALIGNMENT
    scratch = workspace(before + (tiles * tile.splits * tile.m * tile.n * 4 if tile.splits > 1 else 0))
    copy, product = aligned(product, scratch, context.multiprocessors)
    return [copy, launch_product(product, epilogue, tile, context, Pointer(scratch, before, "float"))]


def launch_product(
    product: Product, epilogue: Functor, tile: AnyTile, context: Context, partials: Pointer | None = None
) -> Launch:
    """The launch of a product in the given tile, whose operands lie as it reads them. `partials`: where a split product
    leaves its sums, if not in a workspace of its own."""
    if isinstance(tile, StreamTile):
        return launch_stream(product, epilogue, tile, context)
    sizes = {"m": product.m, "n": product.n, "k": product.k}
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n) * product.batch.count
    if isinstance(tile, WgmmaTile) and tile.batched:
        return _launch_batched(product, epilogue, tile, tiles, context)
    if isinstance(tile, WgmmaTile):
        return _launch_wgmma(product, epilogue, tile, tiles, context, partials)
    operands = operands_of(product, context)
    return launch(
        "gemm",
        "gemm_mma.cuh",
        {
            **tile.config(operands), "refined": operands in (Operands.EXACT, Operands.REFINED),
            "operand": STORAGE[product.dtype],
            "a_access": product.a_access, "a_k_inner": product.a.k_inner,
            "b_access": product.b_access, "b_k_inner": product.b.k_inner, "batch_levels": product.batch.levels,
        },
        [epilogue],
        {
            "a": product.a.pointer, "a_stride": I64(product.a.stride),
            "b": product.b.pointer, "b_stride": I64(product.b.stride),
            **sizes, **product.batch.arguments(),
            **split_arguments(tiles, tile.m * tile.n, tile.threads // 32, tile.splits),
        },
        (tiles, tile.splits, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip


def _launch_simt(step: Step, epilogue: Functor, accumulator: DType) -> Launch:
    """The launch of a product of any types and strides on the ordinary units."""
    a, b = step.inputs[0], step.inputs[1]
    m, row, batch = rows_of(step)
    n, k = b.shape[-1], b.shape[-2]
    types = (a.dtype, b.dtype, accumulator)
    if all(dtype.is_int or dtype is DType.BOOL for dtype in types):
        value = "u64" if accumulator.itemsize == 8 else "u32"
    elif DType.F64 in types or not (a.dtype.is_float or b.dtype.is_float):
        value = "double"
    else:
        value = "float"
    tile = 64
    return launch(
        "gemm",
        "gemm_simt.cuh",
        {
            "value_t": value, "acc_t": STORAGE[accumulator], "a_k_inner": a.strides[-1] == 1,
            "b_k_inner": b.strides[-1] != 1, "batch_levels": batch.levels,
        },
        [epilogue],
        {
            "a": pointer_to(a), "a_row": I64(row), "a_k": I64(a.strides[-1]),
            "b": pointer_to(b), "b_column": I64(b.strides[-1]), "b_k": I64(b.strides[-2]),
            "m": m, "n": n, "k": k, **batch.arguments(),
        },
        (ceildiv(m, tile) * ceildiv(n, tile) * batch.count, 1, 1),
        128,
    )  # fmt: skip


def split_arguments(
    tiles: int, elements: int, warps: int, splits: int, partials: Pointer | None = None
) -> dict[str, Argument]:
    """What kernels/scheduler/split_k.cuh asks of a kernel's arguments: partial sums of `tiles` of so many `elements`,
    where `partials` says or in a workspace, and a counter for each of the `warps` that share a tile."""
    if splits == 1:
        return {}
    partials = partials or Pointer(workspace(tiles * splits * elements * 4), ctype="float")
    arrived = Buffer("arrived", BufferKind.PLAN, tiles * warps * 4, np.zeros(tiles * warps, np.uint32))
    return {
        "partials": partials, "arrived": Pointer(arrived, ctype="u32"), "splits": splits,
    }  # fmt: skip


def _launch_wgmma(
    product: Product, epilogue: Functor, tile: WgmmaTile, tiles: int, context: Context, partials: Pointer | None
) -> Launch:
    a, b, k, columns = product.a, product.b, product.k, 128 // product.dtype.itemsize
    parts = operands_of(product, context).parts
    if parts > 1:
        b, k = in_parts(product, context.weights), columns_in_parts(product.k)
    config: dict[str, int | bool | str] = {"operand": STORAGE[product.dtype], "grouped": False, "parts": parts}
    body, maps = "gemm_wgmma.cuh", dict[str, Argument]()
    if tile.slots:
        staged = epilogue.staged
        assert staged is not None, "the caller has looked"
        body, epilogue = "gemm_staged.cuh", Functor(staged.code, staged.arguments, epilogue.reads)
        config["width"] = STAGED_WIDTH
        box = (product.m, product.n, tile.consumer_rows, tile.staged_columns)
        maps = {"map_result": staged.result.map(*box)}
        if staged.tile is not None:
            maps["map_tile"] = staged.tile.map(*box)
    return launch(
        "gemm",
        body,
        {**tile.config, **config},
        [epilogue],
        {
            **maps,
            "map_a": TensorMap(a.pointer, product.m, product.k, a.stride, tile.m, columns),
            "map_b": TensorMap(b.pointer, product.n, k, b.stride, tile.n, columns),
            "m": product.m,
            "n": product.n,
            "k": k,
            **split_arguments(tiles, tile.m * tile.n, 8 if tile.cooperative else 4, tile.splits, partials),
        },
        # Persistent: a block a multiprocessor.
        (min(tiles, max(1, context.multiprocessors // tile.splits)), tile.splits, 1),
        384,
        tile.shared_bytes,
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.n, product.dtype)}',
    )


def _launch_batched(product: Product, epilogue: Functor, tile: WgmmaTile, tiles: int, context: Context) -> Launch:
    """The launch for products of several matrices, or across the lines of b."""
    a, b, batch = product.a, product.b, product.batch
    sizes = (1, 1, *batch.sizes)[-2:]
    a_along, b_along = ((0, 0, *strides)[-2:] for strides in (batch.a, batch.b))

    def places(strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Inner axis first. Along an axis where all matrices are one there is one place; its stride means nothing."""
        axes = zip(reversed(sizes), reversed(strides), strict=True)
        return tuple((size, stride) if stride else (1, VECTOR) for size, stride in axes)

    across, columns = not b.k_inner, 128 // product.dtype.itemsize
    map_a = TensorMap(a.pointer, product.m, product.k, a.stride, tile.m, columns, places(a_along))
    if across:
        map_b = TensorMap(b.pointer, product.k, product.n, b.stride, columns, columns, places(b_along))
    else:
        map_b = TensorMap(b.pointer, product.n, product.k, b.stride, tile.n, columns, places(b_along))
    multiply = "".join(wgmma_function(tile.n, product.dtype, form) for form in (False, True))  # the kernel names both
    return launch(
        "gemm",
        "gemm_batch.cuh",
        {**tile.config, "operand": STORAGE[product.dtype], "grouped": False, "across": across},
        [epilogue],
        {
            "map_a": map_a, "map_b": map_b,
            "m": product.m, "n": product.n, "k": product.k, "matrices": batch.count, "inner": sizes[1],
            "a_inner": int(a_along[1] != 0), "a_outer": int(a_along[0] != 0),
            "b_inner": int(b_along[1] != 0), "b_outer": int(b_along[0] != 0),
        },
        (min(tiles, context.multiprocessors), 1, 1),
        384,
        tile.shared_bytes,
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma_panels.cuh"\n{multiply}',
    )  # fmt: skip


_INSTRUCTIONS = {
    DType.F16: ("k16.f32.f16.f16", "1, 1, 0, 0"), DType.BF16: ("k16.f32.bf16.bf16", "1, 1, 0, 0"),
    DType.F32: ("k8.f32.tf32.tf32", "1, 1"),
}  # fmt: skip
"""The end of the instruction's name, and its factors of the operands (and, for 16 bits, whether k is not innermost)."""


def wgmma_function(n: int, dtype: DType, across: bool = False) -> str:
    """`wgmma<n, T>`: d (64 × n, fp32) = a · bᵀ, plus d itself where `accumulate` is not 0. Operands are descriptors of
    elements of `dtype`. `wgmma_across<n, T>` (16 bits): the rows of b are k."""
    count, storage, name = n // 2, STORAGE[dtype], "wgmma_across" if across else "wgmma"
    instruction, factors = _INSTRUCTIONS[dtype]
    factors = "1, 1, 0, 1" if across else factors
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"template <int N, class T> DEVICE void {name}(float (&d)[N / 2], u64 a, u64 b, u32 accumulate);\n"
        f"template <> DEVICE void {name}<{n}, {storage}>(float (&d)[{count}], u64 a, u64 b, u32 accumulate) {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'               "wgmma.mma_async.sync.aligned.m64n{n}{instruction} {{{registers}}}, %{count}, %{count + 1}, '
        f'p, {factors};\\n}}"\n'
        f'               : {operands} : "l"(a), "l"(b), "r"(accumulate));\n}}\n'
    )
