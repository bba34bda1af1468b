"""The covering set's matrix products, in every tile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Gemm,
)
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.choices import divides
from engine.targets.cuda.covering.build import (
    ACC,
    BIAS_RESIDUAL,
    F8,
    F16,
    F32,
    I8,
    Given,
    add,
    arg,
    gelu,
    make_step,
    mul,
    stored,
    weight,
)
from engine.targets.cuda.gemm import epilogue_of, launch_product, launches_of, operands_of, parts_of, stages
from engine.targets.cuda.gemm_rows import CLUSTER_ROWS_TILES, ROWS_TILES, SHORT_ROWS_TILES, RowsTile
from engine.targets.cuda.gemm_stream import stream_tiles
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.product import product_of
from engine.targets.cuda.tiles import (
    BATCHED_TILES,
    CLUSTER_TILES,
    MMA_TILES,
    PRODUCT_TILES,
    SHORT_TILES,
    STAGED_TILES,
    WGMMA_TILES,
    Tile,
    WgmmaTile,
)


def products(context: Context) -> Iterator[tuple[str, Launch]]:
    """Products in every tile, whole and split, and in slices, with every kind of operands."""
    fp16, architecture = _product(F16), context.architecture
    fp8, scaled = _product(F8, result=F16), _product(F8, result=F8)  # the type of the result decides how it is stored
    residual = make_step(Gemm((BIAS_RESIDUAL,)), [*fp16.inputs, (F16, (300, 400))])
    portable = [tile for tile in MMA_TILES if tile.shared_bytes <= architecture.shared_bytes]
    wgmma, staged, batched = (WGMMA_TILES, STAGED_TILES, BATCHED_TILES) if architecture.wgmma else ((), (), ())
    short_k = SHORT_TILES if architecture.wgmma else ()
    clusters = CLUSTER_TILES if architecture.wgmma else ()
    joined = JOINED_PRODUCTS if architecture.wgmma else ()
    three = [tile for tile in PRODUCT_TILES if tile.consumers == 3] if architecture.wgmma else []
    three_staged = [tile for tile in staged if tile.consumers == 3]
    divisible: list[Tile] = [*portable, *(tile for tile in wgmma if tile.most_splits > 1)]
    thirds = [replace(tile, splits=3) for tile in divisible]
    rounding = replace(context, tf32=True)
    chosen: list[tuple[Step, Context, Sequence[Tile]]] = [
        (fp16, context, (*portable, *wgmma)),
        (residual, context, thirds),
        # Tiles in bands of several rows.
        (_product(F16, k=4096, n=2176, residual=True), context, (*wgmma[:1], *wgmma[7:8], *staged[:2], *clusters[:1])),
        (_product(F16, k=4096, n=2176), context, (*three[:1], *three_staged[:1], *clusters[3:4], *clusters[-4:])),
        (_product(DType.BF16), context, (portable[0], *wgmma[:1])),
        (_product(F32), rounding, (*portable, *wgmma[:1], *wgmma[7:8])),
        (computed(_product(F32)), rounding, (portable[0], portable[-1], *wgmma[:1], *wgmma[7:8])),
        (_product(F32), context, portable),
        (_product(F16, k=387, n=401), context, (portable[1], *(replace(tile, aligns=True) for tile in wgmma))),
        (_product(F16, k=387, n=401), context, [replace(t, aligns=True, splits=3) for t in wgmma if t.most_splits > 1]),
        (_product(DType.BF16, k=388, n=402, residual=True), context, [replace(t, aligns=True) for t in wgmma[:1]]),
        (_product(F32, k=387, n=401), rounding, [replace(tile, aligns=True) for tile in wgmma[:1]]),
        (residual, context, (*staged[:2], *staged[3:-1])),
        (_product(DType.BF16, residual=True), context, staged[-1:]),
        (fp16, context, staged[2:3]),
        (residual, context, short_k),
        (_product(DType.BF16, n=402), context, short_k),
        (_product(F32, result=F16, residual=True), rounding, staged[:1]),
        # Rows that begin anywhere, in halves of words and in words; divided rows, of which some tiles are full.
        (_product(F16, n=401), context, staged),
        (_product(DType.BF16, n=402), context, (*staged[:1], *staged[4:5])),
        (_product(F16, n=65), context, staged[1::2]),
        (_product(DType.BF16, n=66), context, staged[2:3]),
        (_divided(residual=False, n=401), context, (*staged[:1], *staged[3:4])),
        (fp8, context, (*staged[:1], *staged[3:4], *clusters[:1])),
        (_product(I8, result=F16, residual=True), context, (*staged[:1], *staged[3:4])),
        (residual, context, joined[::6]),
        (fp16, context, joined[1::9]),
        (_product(F16, k=387, n=401), context, [replace(tile, aligns=True) for tile in joined[2:4]]),
        (_product(I8, result=F16), context, joined[1:2]),
        (_product(F32), rounding, joined[1:2]),
        (residual, context, clusters[:-1]),
        (_product(DType.BF16, residual=True), context, clusters[-1:]),
        (_product(F32), rounding, clusters[:1]),
        (fp8, context, (*portable, *wgmma)),
        (scaled, context, (portable[0], *wgmma[:1], *wgmma[7:8])),
        (_product(F8, result=F16, residual=True), context, thirds[::2]),
        (_product(F8, k=387, n=401, result=F16), context, (portable[1], *(replace(t, aligns=True) for t in wgmma[:2]))),
        (_product(F8, k=388, n=401, result=F8), context, (portable[1],)),
        (_product(I8, result=F16), context, (*portable, *wgmma)[::2]),  # the two types of 8 bits take turns
        (_product(I8, result=I8), context, (portable[0], *wgmma[:1], *wgmma[7:8])),
        (_product(I8, result=F16, residual=True), context, thirds[1::2]),
        (_product(I8, k=387, n=401, result=F16), context, (portable[1], *(replace(t, aligns=True) for t in wgmma[:2]))),
        (fp16, context, three),
        (_product(DType.BF16, residual=True), context, three[-1:]),
        (fp8, context, three[-1:]),
        (_product(I8, result=F16), context, three[:1]),
        (_product(I8, result=F16, residual=True), context, three_staged[:1]),
        (computed(_product(F32)), rounding, three[:1]),
        # Of divided rows what takes the most registers; moments in every tile that finds them.
        (_divided(residual=False), context, (*portable[:1], *wgmma[:1], *wgmma[7:9], *staged[:1], *clusters[:1])),
        (_divided(residual=True), context, [tile for tile in thirds if _is_wide(tile)]),
        (_divided(residual=True), context, joined[1::11]),
        (_divided(residual=True, dtype=DType.BF16), context, (*wgmma[3:4], *staged[-1:], *clusters[2:3])),
        (_finding(residual), context, (*portable[:1], *staged, *short_k, *(tile for tile in clusters if tile.slots))),
        # Normalised residuals beside moments, and in the other kernels what takes the most registers.
        (_normalising(finds=True), context, (*staged, *short_k, *(tile for tile in clusters if tile.slots))),
        # GELU of staged results, which is computed in halves.
        (_activated(), context, (*staged, *(tile for tile in clusters if tile.slots))),
        (_activated(dtype=DType.BF16, n=402), context, (*staged[:1], *staged[3:4])),
        (_normalising(), context, (*portable[:1], *wgmma[:1], *wgmma[7:9], *three, *staged[3:5], *clusters[:1])),
        (_normalising(), context, [tile for tile in thirds if _is_wide(tile)]),
        (_normalising(dtype=DType.BF16, finds=True), context, (*staged[:1], *staged[4:5], *clusters[-1:])),
        (_matrices(k_inner=True, dtype=I8), context, batched[:2]),
        (_matrices(k_inner=True, dtype=F8), context, (*portable[:1], *batched)),
        (_matrices(k_inner=False), context, batched[:-1]),
        (_matrices(k_inner=True), context, batched[-1:]),
    ]
    for step, how, tiles in chosen:
        assert isinstance(step.op, Gemm)
        found = parts_of(step, how)
        assert found is not None
        product, epilogue = found
        for tile in (tile for tile in tiles if divides(product, tile) and stages(product, epilogue, tile)):
            for launch in launches_of(product, epilogue, tile, how):
                yield f"gemm {tile}", launch
    short: list[Step] = [
        *(_product(dtype, 5000, k, 96 + k) for dtype, k in ((F16, 16), (DType.BF16, 32), (F32, 8), (F32, 16))),
        *(_product(F16, 5000, k, n, residual=True) for k, n in ((32, 128), (40, 240), (64, 96))),
        *(_product(dtype, 5000, k, n) for dtype, k, n in ((DType.BF16, 64, 256), (F32, 32, 96))),
        # Rows that begin at multiples of 4 bytes, and rows of the result that begin anywhere.
        *(_product(F16, 5000, k, n, residual=True) for k, n in ((14, 81), (26, 81), (62, 250), (32, 90))),
        *(_product(dtype, 5000, k, n) for dtype, k, n in ((DType.BF16, 46, 130), (F32, 7, 90))),
    ]
    for step in (*short, *(computed(step) for step in short[2:4])):
        assert isinstance(step.op, Gemm)
        product = product_of(step, rounding)
        operands = operands_of(product, rounding)
        epilogue = epilogue_of(step, step.op.stores, (0, 1), product.n)
        slices = stream_tiles(product, operands)
        pairs = (one for one in slices if one.groups == 2)
        for one in dict.fromkeys((slices[0], *pairs, slices[-1])):
            yield f"gemm {one}", launch_product(product, epilogue, one, rounding)


def _is_wide(tile: Tile) -> bool:
    """Whether a lane has 64 accumulators in it, or more."""
    return isinstance(tile, WgmmaTile) and tile.consumer_rows * tile.n >= 128 * 64


def _divided(residual: bool, dtype: DType = F16, m: int = 300, k: int = 384, n: int = 400) -> Step:
    """A product of divided rows with a weight, and a bias of fp32."""
    biased = add(ACC, arg(3, F32))
    store = stored(add(biased, arg(4, dtype)) if residual else gelu(biased), dtype)
    inputs: list[Given] = [(dtype, (m, k)), weight(k, n, dtype=dtype), (F32, (m, 1)), weight(n, dtype=F32)]
    return make_step(Gemm((store,), divided=True), [*inputs, *([(dtype, (m, n))] if residual else [])])


def _activated(dtype: DType = F16, n: int = 400) -> Step:
    """A product with a weight, a bias and GELU."""
    inputs: list[Given] = [(dtype, (300, 384)), weight(384, n, dtype=dtype), weight(n, dtype=dtype)]
    return make_step(Gemm((stored(gelu(add(ACC, arg(2, dtype))), dtype),)), inputs)


def _normalising(dtype: DType = F16, finds: bool = False, m: int = 300, k: int = 384) -> Step:
    """A product with a weight and a bias that normalises the residual which it adds, and `finds` factors and offsets
    of its own rows."""
    centred = ex.apply(PointOp.SUB, mul(arg(2, dtype), arg(3, F32)), arg(4, F32))
    store = stored(add(add(ACC, arg(6, F32)), mul(arg(5, F32), centred)), dtype)
    inputs: list[Given] = [
        (dtype, (m, k)),
        weight(k, 400, dtype=dtype),
        (dtype, (m, 400)),
        (F32, (m, 1)),
        (F32, (m, 1)),
    ]
    op = Gemm((store,), factors=1e-5 if finds else None, offsets=finds)
    return make_step(op, [*inputs, weight(400, dtype=F32), weight(400, dtype=F32)])


def _finding(step: Step) -> Step:
    """The same product, finding the factors of its rows."""
    assert isinstance(step.op, Gemm)
    return make_step(replace(step.op, factors=1e-5), step.inputs)


def few_rows(context: Context) -> Iterator[tuple[str, Launch]]:
    """Products of up to 8 and up to 16 rows, with a weight and with computed columns; of divided rows, and with
    residuals that are normalised."""
    split = [replace(tile, splits=2) for tile in ROWS_TILES]
    if context.architecture.wgmma:  # alone, and several beside each other
        split += [replace(tile, splits=s, cluster=c) for tile in CLUSTER_ROWS_TILES for s, c in ((6, 6), (6, 3))]
    for m, dtype, residual in ((5, F16, False), (16, F16, True), (16, DType.BF16, False)):
        step = _product(dtype, m, 3000, 400, residual)
        for one in (step, computed(step)):
            yield from _of_few_rows(one, (*ROWS_TILES, *split, *SHORT_ROWS_TILES), context)
    some = (*ROWS_TILES[::2], *split[-1:])
    yield from _of_few_rows(_divided(residual=False, m=5, k=3000), some, context)
    yield from _of_few_rows(_normalising(m=16, k=3000), some, context)


def _of_few_rows(step: Step, tiles: Iterable[RowsTile], context: Context) -> Iterator[tuple[str, Launch]]:
    found = parts_of(step, context)
    assert found is not None
    for tile in tiles:
        yield f"gemm {tile}", launch_product(*found, tile, context)


def computed(step: Step) -> Step:
    """The same product with a computed second operand, k innermost."""
    b = step.inputs[1]
    buffer = Buffer("computed", BufferKind.INPUT, b.buffer.nbytes)
    return replace(step, inputs=(step.inputs[0], replace(b, buffer=buffer, strides=(1, b.shape[0])), *step.inputs[2:]))


def _matrices(k_inner: bool, dtype: DType = F16) -> Step:
    """Twelve products of computed matrices."""
    step = make_step(Gemm((stored(ACC),)), [(dtype, (4, 3, 300, 384)), (dtype, (4, 3, 384, 400))])
    b = step.inputs[1]
    if k_inner:
        b = replace(b, strides=(*b.strides[:2], 1, b.shape[2]))
    return replace(step, inputs=(step.inputs[0], b))


def _product(
    dtype: DType, m: int = 300, k: int = 384, n: int = 400, residual: bool = False, result: DType | None = None
) -> Step:
    """A product with a weight, bias and GELU, or a residual. `result`: the type of the result, the bias and the
    residual, where it is not that of the operands."""
    result = result or dtype
    biased = add(ACC, arg(2, result))
    store = stored(add(biased, arg(3, result)) if residual else gelu(biased), result)
    inputs: list[Given] = [(dtype, (m, k)), weight(k, n, dtype=dtype), weight(n, dtype=result)]
    return make_step(Gemm((store,)), [*inputs, *([(result, (m, n))] if residual else [])])
