"""Matrix products. Picks between the portable kernel (gemm_mma.cuh), on sm_90a TMA and wgmma (gemm_wgmma.cuh), where
memory is the limit slices of rows (gemm_stream.py) and a kernel for few rows (gemm_rows.py), and, for types that the
matrix units do not take, the ordinary units (gemm_simt.cuh)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeGuard

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Gemm, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen, row_factors
from engine.targets.cuda.align_rows import aligned, aligned_bytes, split, split_bytes
from engine.targets.cuda.choices import divides, key_of, tile_of
from engine.targets.cuda.gemm_rows import AnyTile, RowsTile, launch_rows
from engine.targets.cuda.gemm_stream import StreamTile, launch_stream, tile_cycles
from engine.targets.cuda.gemm_wgmma import launch_batched, launch_wgmma, scratch_bytes, split_arguments
from engine.targets.cuda.kernel import (
    ALIGNMENT,
    I64,
    STORAGE,
    Context,
    Functor,
    Instruction,
    Launch,
    Pointer,
    Reads,
    ceildiv,
    launch,
    pointer_to,
    without_stages,
    workspace,
)
from engine.targets.cuda.product import Found, Product, is_weight, product_of, rows_inner, rows_of
from engine.targets.cuda.product_cost import (
    CHOSEN_BY_MODEL,
    Ranked,
    Way,
    ranked_batched,
    ranked_cluster,
    ranked_joined,
    ranked_mma,
    ranked_rows,
    ranked_short,
    ranked_staged,
    ranked_stream,
    ranked_wgmma,
    trusts,
)
from engine.targets.cuda.spaces import operand, operands, space
from engine.targets.cuda.staging import staged_epilogue
from engine.targets.cuda.tiles import NOTHING, Operands, WgmmaTile

_MOST_SLICES = 3  # ways of slicing a product that are worth timing
_MATRIX_TYPES = (DType.F16, DType.BF16, DType.F8E4M3, DType.I8, DType.F32)
_MOST_INSTRUCTIONS = 2
"""Of epilogues beside which tiles find moments: a bias and a residual; or a residual that is normalised (`reads_rows`).
With a scale, GELU or a sigmoid full tiles would spill (the gate shows it)."""


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """On the matrix units operands need one of their last two axes contiguous; weights are packed, whatever their
    layout. Raises UnsupportedOp for strings."""
    assert isinstance(op, Gemm)
    a, b = inputs[0], inputs[1]
    if DType.STRING in (a.dtype, b.dtype):
        raise UnsupportedOp(f"Gemm of {a.dtype.value} and {b.dtype.value}")
    needs = (Requirement(), Requirement())
    if _on_matrix_units(op, a, b):
        narrow = a.dtype.itemsize == 1  # the instructions want k innermost in both
        b_need = Requirement() if is_weight(b) else _inner(b, narrow or (b.strides[-2] == 1 and b.strides[-1] != 1))
        needs = (_inner(a, rows_inner(a) and not narrow), b_need)
    output = len(op.infer(inputs)[0][1])
    factors: tuple[Requirement, ...] = ()
    if op.divided:
        narrow = a.dtype in (DType.F16, DType.BF16) and _on_matrix_units(op, a, b)
        if not narrow or not is_weight(b):
            raise UnsupportedOp(f"Gemm of divided rows of {a.dtype.value} and {b.dtype.value}, or without a weight")
        if op.factors is not None:
            raise UnsupportedOp("Gemm of divided rows that finds factors of others: registers do not hold both")
        dense = row_factors.dense(len(a.shape))
        needs, factors = (dense, needs[1]), (dense,)
    given = (*needs, *factors, *(Requirement() for _ in inputs[op.operands :]))
    if op.factors is not None:
        if len(op.stores) != 1 or op.stores[0].dtype not in (DType.F16, DType.BF16) or not _on_matrix_units(op, a, b):
            raise UnsupportedOp("Gemm with factors of a result that is not one of 16 bits, from the matrix units")
        return given, (row_factors.dense(output),) * len(op.infer(inputs))
    return given, tuple(Requirement(Access.INNER, tuple(range(output))) for _ in op.stores)


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
    product, order, accumulator = product_of(step, context), tuple(range(len(shape))), _accumulator(op)
    results = replace(step, outputs=step.outputs[: len(op.stores)])
    epilogue = epilogue_of(results, op.stores, order, shape[-1], accumulator)
    if op.factors is not None:
        result, *factors = step.outputs
        short = reads_rows(epilogue) or epilogue.reads.instructions <= _MOST_INSTRUCTIONS
        product = replace(product, factors=row_factors.found_at(result, factors, op.factors, short))
    if op.divided:
        quotient = ex.apply(PointOp.MUL, ex.Acc(accumulator), ex.cast(ex.Arg(2, DType.F32), accumulator))
        stores = [ex.replace_acc(store, quotient) for store in op.stores]
        product = replace(product, divisors=row_factors.pointer_of(step.inputs[2]))
        dividing = epilogue_of(results, stores, order, shape[-1], accumulator)
        # Registers do not hold factors of rows beside what a staged epilogue reads of them.
        stage = without_stages if reads_rows(epilogue) else epilogue.stage
        epilogue = replace(epilogue, dividing=dividing, stage=stage)
    return product, epilogue


def reads_rows(epilogue: Functor) -> bool:
    """Whether its staged form reads operands that are the same in every column (it normalises a residual)."""
    return epilogue.staged is not None and epilogue.staged.reads_rows


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
    if chosen is not None and stages(product, epilogue, chosen):
        return chosen
    return estimated_best(product, epilogue, context).tile


_DOUBT = 1.01
"""Of equal estimates that of single blocks is taken: on an H100 384×768×3072 with its rows' factors took 9.8 µs in
64×64 and 10.5 in 64×96 by clusters of two, where 10.85 was estimated of both. And where a full tile is read that of
results not staged: 960→160@7 with a residual at batch 128 took 9.1 µs in 64×160 and 10.2 in a staged 128×96, 240→40@28
25.1 in 128×64 and 27.3 in the same staged."""


def estimated_best(product: Product, epilogue: Functor, context: Context) -> Ranked:
    """The tile that should be the fastest."""

    def trusted(ranked: Sequence[Ranked]) -> Iterator[Ranked]:
        every = (one for one in ranked if trusts(product, one.tile, context.multiprocessors))
        return islice(every, 1)

    (best,) = trusted(ranked_tiles(product, context, epilogue.reads))
    if isinstance(best.tile, StreamTile):
        return best
    # What the rows' own kernel reads at the speed of memory, no cluster was measured to read faster.
    ways = (way for way in CHOSEN_BY_MODEL if way is not Way.JOINED or not isinstance(best.tile, RowsTile))
    rivals = (best, *(one for way in ways for one in trusted(ranked_in(way, product, epilogue, context))))

    def cycles(ranked: Ranked) -> float:
        tile = ranked.tile
        reads_tile = epilogue.reads.varying > epilogue.reads.by_row
        doubted = isinstance(tile, WgmmaTile) and (tile.cluster_k > 1 or (tile.slots > 0 and reads_tile))
        return ranked.estimate.cycles * (_DOUBT if doubted else 1)

    return min(rivals, key=cycles)


def stages(product: Product, epilogue: Functor, tile: AnyTile) -> bool:
    """Whether a product's results can go through shared memory, if they do in a tile. Those whose rows begin anywhere
    can in tiles of single blocks, where no factors are asked for, and divided rows in those that leave registers."""
    if not needs_staged(tile):
        return True
    form = epilogue.staged
    if form is None or not form.ragged:
        return form is not None
    full = product.divisors is not None and tile.accumulators > 128
    return product.factors is None and tile.cluster == 1 and not full


def needs_staged(tile: AnyTile) -> TypeGuard[WgmmaTile]:
    """Whether a tile is for epilogues that have a staged form."""
    return isinstance(tile, WgmmaTile) and tile.slots > 0


def ranked_tiles(product: Product, context: Context, reads: Reads = NOTHING) -> list[Ranked]:
    """The tiles that can take a product, with k in one part or in several, from what should be the fastest on."""
    operands, multiprocessors = operands_of(product, context), context.multiprocessors
    factor = product.divisors is not None  # for one more operand, where the epilogue divides rows
    others = replace(reads, varying=reads.varying + factor, by_row=reads.by_row + factor)
    every = [*ranked_mma(product, operands, context.architecture, multiprocessors, others)]
    if context.architecture.wgmma and product.suits_tma_aligned and operands is not Operands.EXACT:
        tiles = ranked_wgmma(product, operands, multiprocessors, reads)
        every += (one for one in tiles if divides(product, one.tile))
    every += ranked_rows(product, operands, context.architecture.wgmma, multiprocessors, others)
    every.sort(key=lambda ranked: ranked.estimate.cycles)
    slices, best = ranked_stream(product, operands, multiprocessors, reads), every[0].tile
    if slices and not isinstance(best, RowsTile):
        assert not isinstance(best, StreamTile), "they are not among the others yet"
        first = 0 if slices[0].estimate.memory < tile_cycles(product, best, multiprocessors, operands) else 1
        every[first:first] = slices[:_MOST_SLICES]
    return every


def other_tiles(product: Product, epilogue: Functor, context: Context) -> Mapping[Way, list[Ranked]]:
    """The tiles of every other way that can take a product, from what should be the fastest on."""
    return {way: ranked_in(way, product, epilogue, context) for way in Way}


def ranked_in(way: Way, product: Product, epilogue: Functor, context: Context) -> list[Ranked]:
    """The tiles of another way that can take a product, from what should be the fastest on."""
    operands, multiprocessors = operands_of(product, context), context.multiprocessors
    single = product.suits_tma_aligned and operands is not Operands.EXACT
    found: Iterable[Ranked] = ()
    if not context.architecture.wgmma:
        return []
    if way is Way.STAGED and single:
        found = ranked_staged(product, operands, multiprocessors, epilogue.reads)
    elif way is Way.SHORT and single:
        found = ranked_short(product, operands, multiprocessors, epilogue.reads)
    elif way is Way.CLUSTER and single:
        found = ranked_cluster(product, operands, multiprocessors, epilogue.reads)
    elif way is Way.JOINED and single:
        found = ranked_joined(product, operands, multiprocessors, epilogue.reads)
    elif way is Way.BATCHED and product.suits_tma_batched:
        found = ranked_batched(product, operands, multiprocessors, epilogue.reads)
    fitting = (one for one in found if divides(product, one.tile) and stages(product, epilogue, one.tile))
    return sorted(fitting, key=lambda ranked: ranked.estimate.cycles)


_NARROW = {
    DType.F16: Operands.HALF, DType.BF16: Operands.HALF, DType.F8E4M3: Operands.BYTES, DType.I8: Operands.BYTES,
}  # fmt: skip


def operands_of(product: Product, context: Context) -> Operands:
    """How the matrix units take the operands. Constants of fp32 are never just rounded: their errors are the same in
    every row, so that what follows does not average them out."""
    if product.dtype in _NARROW:
        return _NARROW[product.dtype]
    if not context.tf32:
        return Operands.EXACT
    return Operands.REFINED if product.b.is_constant else Operands.TF32


def launches_of(product: Product, epilogue: Functor, tile: AnyTile, context: Context, taken: int = 0) -> list[Launch]:
    """The launches of a product in the given tile. `taken`: the bytes of the workspace in which a lies."""
    launches, apart = _launches_of_product(product, epilogue, tile, context, taken), found_apart(product, tile)
    if apart is not None:
        launches.append(row_factors.launch_factors(apart, product.m * product.batch.count, product.n))
    return launches


def found_apart(product: Product, tile: AnyTile) -> Found | None:
    """The factors of the result's rows, if they are asked for, where they take a launch of their own after the tile's;
    else None."""
    return None if isinstance(tile, WgmmaTile) and product.found_in(tile) is not None else product.factors


def _launches_of_product(
    product: Product, epilogue: Functor, tile: AnyTile, context: Context, taken: int
) -> list[Launch]:
    in_parts = operands_of(product, context) is Operands.REFINED
    if not (isinstance(tile, WgmmaTile) and (tile.aligns or in_parts)):
        return [launch_product(product, epilogue, tile, context)]
    begin = ceildiv(taken, ALIGNMENT) * ALIGNMENT
    nbytes = split_bytes(product) if in_parts else aligned_bytes(product)
    end = begin + ceildiv(nbytes, ALIGNMENT) * ALIGNMENT
    scratch = workspace(end + scratch_bytes(product, tile))
    place, multiprocessors = Pointer(scratch, begin), context.multiprocessors
    copy, product = (
        split(product, place, context.weights, multiprocessors)
        if in_parts
        else aligned(product, place, multiprocessors)
    )
    return [copy, launch_product(product, epilogue, tile, context, Pointer(scratch, end))]


def launch_product(
    product: Product, epilogue: Functor, tile: AnyTile, context: Context, scratch: Pointer | None = None
) -> Launch:
    """The launch of a product in the given tile, whose operands lie as it reads them. `scratch`: where blocks leave
    each other `scratch_bytes`, if not in a workspace of its own."""
    if epilogue.dividing is not None and not isinstance(tile, WgmmaTile):
        epilogue = epilogue.dividing
    if isinstance(tile, StreamTile):
        return launch_stream(product, epilogue, tile, context)
    if isinstance(tile, RowsTile):
        return launch_rows(product, epilogue, tile)
    sizes = {"m": product.m, "n": product.n, "k": product.k}
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n) * product.batch.count
    if isinstance(tile, WgmmaTile) and tile.batched:
        return launch_batched(product, epilogue, tile, tiles, context)
    if isinstance(tile, WgmmaTile):
        return launch_wgmma(product, epilogue, tile, context, scratch)
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
