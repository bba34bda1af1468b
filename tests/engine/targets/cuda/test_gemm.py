"""Products against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.plan import Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda import tiles
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.gemm import epilogue_of, launches_of, lower, operands_of, parts_of, pick_tile
from engine.targets.cuda.gemm_stream import StreamTile, stream_tiles
from engine.targets.cuda.kernel import Context, Launch, WeightStore, content
from engine.targets.cuda.product import product_of, round_to_tf32, split_weight
from engine.targets.cuda.tiles import MMA_TILES, PRODUCT_TILES, Tile, WgmmaTile
from tests.engine.targets.cuda.cases import broadcast_of, check, check_late, fed, ragged, rng_of, thinned, wiped
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner, compare

BF16 = DType.BF16
KINDS = {"fp16": (F16, False), "bf16": (BF16, False), "tf32": (F32, True), "fp32": (F32, False)}
"""Kinds of operands: (dtype, whether fp32 is rounded to tf32)."""
EXACT = 2.0**-21
"""How operands are taken as they are: fp32 loses its last bits."""
NEAREST = 1.5 * 2.0**-11
"""How one operand is taken that is rounded to the nearest tf32. Between 1 and 2, where squares are 7/3 on average,
steps are 2⁻¹⁰ and errors 2⁻¹⁰/√12: 0.76 · 2⁻¹² of a number, and as much of a sum of products, in standard deviations.
`compare` allows twice the figure: 8 of them, beyond which is none of 10¹² elements."""
BOTH_NEAREST = 2.0**-10
"""The same where both operands are rounded, so that deviations are √2 as large: 7.5 of them."""


def stores_of(dtype: DType) -> Mapping[str, ex.Expr]:
    """Epilogues whose operands and results are of `dtype`."""
    biased = cv.add(ACC, cv.arg(2, dtype))
    return {
        "bias": cv.stored(biased, dtype),
        "bias gelu": cv.stored(cv.gelu(biased), dtype),
        "residual": cv.stored(cv.add(biased, cv.arg(3, dtype)), dtype),
        "plain": ACC,
    }


def rounding(kind: str, weight: bool = True) -> float:
    """A weight of fp32 is in two parts where the other operand is rounded."""
    return EXACT if kind != "tf32" else NEAREST if weight else BOTH_NEAREST


def context_of(runner: Runner, kind: str) -> Context:
    return replace(runner.context, tf32=KINDS[kind][1])


def tiles_of(runner: Runner, kind: str) -> list[Tile]:
    """The tiles for operands of this kind; those of wgmma need them to lie as the copy engine reads."""
    wgmma = runner.context.architecture.wgmma and kind != "fp32"
    return [*MMA_TILES, *(PRODUCT_TILES if wgmma else ())]


def test_gemm_of_every_kind_with_weight_matches_float64(runner: Runner, count: int) -> None:
    """In every tile, k in one part or in several."""
    rng, cases = rng_of("kinds"), []
    for i in range(2 * count):
        kind = list(KINDS)[i % 4]
        tiles, dtype = tiles_of(runner, kind), KINDS[kind][0]
        tile = tiles[int(rng.integers(0, len(tiles)))]
        if isinstance(tile, WgmmaTile) and i % 3:
            tile = replace(tile, aligns=True)
        aligned = isinstance(tile, WgmmaTile) and not tile.aligns
        name, splits = list(stores_of(F16))[int(rng.integers(0, 4))], int(rng.choice([1, 1, 2, 3, 7]))
        m, k, n = ragged(rng, 300), ragged(rng, 600, 8 if aligned else 1), ragged(rng, 300)
        a = fed(dtype, (m, k), inner=-1 if isinstance(tile, WgmmaTile) or i % 8 < 4 else -2, number=0)
        inputs: list[cv.Given] = [a, weight(k, n, dtype=dtype)]
        inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
        inputs += [(dtype, (m, n))] if name == "residual" else []
        splits = min(splits, tile.most_splits)
        step = make_step(Gemm((stores_of(dtype)[name],)), inputs)
        launches = launched(step, replace(tile, splits=splits), context_of(runner, kind))
        label = f"{kind} {m}x{n}x{k} {name} {tile} in {splits}"
        # Twice, with the result wiped in between: a split product must leave its counters as it found them.
        launches = [*launches, *wiped(step.outputs[0], runner.context), *launches] if splits > 1 else launches
        cases.append(Case(label, step, k, lowered=launches, rounding=rounding(kind)))
    check(runner, cases)


def test_fp32_is_rounded_to_nearest_and_weights_are_not(runner: Runner) -> None:
    """In every tile: the result is that of operands rounded on the host, but for what the instruction loses when it
    adds in fp32 and truncates. Beside a weight, tiles of wgmma round nothing: both are in two parts. No operand
    lies halfway, where the units differ: the copy engine takes the even number, the conversion the larger."""
    rng, context, lost = rng_of("nearest"), context_of(runner, "tf32"), 2.0**-16
    for m, k, n in ((70, 48, 40), (300, 16, 96), (300, 8, 96)):
        for known in (True, False):
            arrays = [without_halves(rng.standard_normal(shape)) for shape in ((m, k), (k, n))]
            b = arrays[1] if known else fed(F32, (k, n), 0, 1)
            step = make_step(Gemm((ACC,)), [fed(F32, (m, k), -1, 0), b])
            product = product_of(step, context)
            slices = stream_tiles(product, operands_of(product, context))
            b_taken = arrays[1] if known else round_to_tf32(arrays[1])
            for tile in (*tiles_of(runner, "tf32"), *slices):
                launches = launched(step, tile, context)
                assert all(runner.prepare(launch.kernel) is None for launch in launches)
                (got,) = runner.run(step, launches, arrays)
                a = arrays[0] if known and isinstance(tile, WgmmaTile) else round_to_tf32(arrays[0])
                expected = a.astype(np.float64) @ b_taken.astype(np.float64)
                ratio, problem = compare(got, expected.astype(np.float32), k, lost)
                runner.tally.count(step, ratio, failed=problem is not None)
                assert problem is None, f"{m}x{n}x{k} {tile}, {'constant' if known else 'computed'}: {problem}"


def without_halves(x: np.ndarray) -> np.ndarray:
    """fp32 with the last bit set, so that nothing lies in the middle between two numbers of tf32."""
    return (x.astype(np.float32).view(np.uint32) | np.uint32(1)).view(np.float32)


def test_rounding_on_the_host() -> None:
    """To nearest, halves away from zero, to the next binade and to infinity; what is not finite stays."""
    step = 2.0**-10
    x = np.array([1 + step / 2, -1 - step / 2, 1 + 0.49 * step, 2 - step / 4, 0, -0.0, np.inf, -np.inf], np.float32)
    rounded = round_to_tf32(x)
    assert np.array_equal(rounded, np.array([1 + step, -1 - step, 1, 2, 0, 0, np.inf, -np.inf], np.float32))
    assert np.array_equal(np.signbit(rounded), np.signbit(x))
    assert np.isinf(round_to_tf32(np.array([np.finfo(np.float32).max])))
    assert np.isnan(round_to_tf32(np.array([np.nan, -np.nan], np.float32))).all()


def test_a_weight_in_two_parts_adds_up_to_16_bits() -> None:
    b = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    b[0, 0] = np.inf
    parts = split_weight(b)
    assert parts.dtype == BF16.numpy
    big, small = (parts.reshape(3, 2, 2, 64)[:, :, i].reshape(3, 128).astype(np.float64) for i in range(2))
    assert not big[:, 70:].any() and not small[:, 70:].any()
    assert np.isinf(big[0, 0]) and small[0, 0] == 0
    finite = np.isfinite(b)
    off = big[:, :70][finite] + small[:, :70][finite] - b[finite]
    assert (np.abs(off) <= 2.0**-17 * np.abs(b[finite])).all()


def test_rows_in_two_parts_keep_what_is_not_finite(runner: Runner) -> None:
    """In tiles of wgmma beside a weight: ones beside infinities and NaN, which reach their own rows only."""
    if not runner.context.architecture.wgmma:
        pytest.skip("the kernel is of sm_90a")
    a = np.ones((130, 70), np.float32)
    a[3, 69], a[64, 0] = np.inf, np.nan
    b = np.ones((70, 8), np.float32)
    step = make_step(Gemm((ACC,)), [fed(F32, a.shape, -1, 0), b])
    launches = launched(step, PRODUCT_TILES[0], context_of(runner, "tf32"))
    assert len(launches) == 2, "a is split before"
    assert all(runner.prepare(launch.kernel) is None for launch in launches)
    (got,) = runner.run(step, launches, [a, b])
    broken = np.isin(np.arange(130), (3, 64))
    assert (got[~broken] == 70).all() and not np.isfinite(got[broken]).any()


def test_gemm_in_slices_matches_float64(runner: Runner, count: int) -> None:
    """Every kind of operands, steps of k and columns, in every number of parts; rows of several slices a warp, some of
    them beyond the last; rows that begin at multiples of 16 bytes, and of 4."""
    rng, cases = rng_of("slices"), []
    for i in range(2 * count):
        kind = list(KINDS)[i % 3]
        dtype, chunk = KINDS[kind][0], 16 // KINDS[kind][0].itemsize
        least = chunk // 4 if i % 4 in (1, 2) else chunk
        m, k, n = ragged(rng, 4000), least * int(rng.integers(1, 8 * chunk // least + 1)), int(rng.integers(1, 400))
        name = list(stores_of(F16))[i % 4]
        inputs: list[cv.Given] = [fed(dtype, (m, k), -1, 0), weight(k, n, dtype=dtype)]
        inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
        inputs += [(dtype, (m, n))] if name == "residual" else []
        step, context = make_step(Gemm((stores_of(dtype)[name],)), inputs), context_of(runner, kind)
        tiles = stream_tiles(product_of(step, context), operands_of(product_of(step, context), context))
        tile = tiles[int(rng.integers(0, len(tiles)))]
        label = f"{kind} {m}x{n}x{k} {name} {tile}"
        cases.append(Case(label, step, k, lowered=launched(step, tile, context), rounding=rounding(kind)))
    check(runner, cases)


def test_slices_are_for_many_rows_and_little_work() -> None:
    """On an H100 the shapes of MobileNet v2 and EfficientNet at batch 128 that leave tiles half empty run in slices;
    others stay with tiles of wgmma."""
    context = Context(ARCHITECTURES["sm_90a"], 132, WeightStore())

    def slices(m: int, k: int, n: int, dtype: DType = F16) -> bool:
        step = make_step(Gemm((stores_of(dtype)["bias"],)), [(dtype, (m, k)), weight(k, n, dtype=dtype), weight(n)])
        parts = parts_of(step, context)
        assert parts is not None
        return isinstance(pick_tile(*parts, context), StreamTile)

    large, medium = 128 * 112 * 112, 128 * 56 * 56
    assert all(slices(*shape) for shape in ((large, 16, 96), (large, 32, 16), (medium, 24, 144)))
    assert not any(
        slices(*shape) for shape in ((medium, 64, 256), (medium, 256, 64), (4096, 768, 3072), (128, 64, 1000))
    )
    assert not slices(large, 16, 96, F32), "slices round fp32 to tf32"


def launched(step: Step, tile: Tile | StreamTile, context: Context) -> list[Launch]:
    """The launches of a product of matrices in a given tile."""
    assert isinstance(step.op, Gemm)
    product = product_of(step, context)
    return launches_of(product, epilogue_of(step, step.op.stores, (0, 1), product.n), tile, context)


def test_a_split_product_has_the_same_bits_in_every_run(runner: Runner, count: int) -> None:
    m, n, k = 70, 90, 1000
    rng, step = rng_of("bits"), make_step(Gemm((ACC,)), [(F16, (m, k)), weight(k, n)])
    arrays = [rng.standard_normal((m, k)).astype(F16.numpy), content(step.inputs[1])]
    for tile in tiles_of(runner, "fp16")[-4:]:
        launches = launched(step, replace(tile, splits=5), runner.context)
        first, *others = (runner.run(step, launches, arrays)[0].copy() for _ in range(max(2, count // 10)))
        assert all(np.array_equal(first, other) for other in others), tile


def test_gemm_of_every_kind_of_activations_matches_float64(runner: Runner, count: int) -> None:
    """Batches that broadcast in any way, operands in any layout, sizes of one."""
    rng, cases = rng_of("layouts"), []
    for i in range(2 * count):
        kind = list(KINDS)[i % 4]
        dtype = KINDS[kind][0]
        m, k, n = (1 if rng.random() < 0.1 else ragged(rng, 150, int(rng.choice([1, 2, 8]))) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 5))))
        a = window(rng, dtype, (*broadcast_of(rng, lead), m, k), 0)
        b = window(rng, dtype, (*broadcast_of(rng, lead), k, n), 1)
        step = make_step(Gemm((cv.stored(ACC, dtype),)), [a, b])
        (result,) = step.outputs
        if i % 2:  # matrices may lie in one another, as the heads of a token do
            rows = len(result.shape) - 1
            order = (*(int(axis) for axis in rng.permutation(rows)), rows)
            result = replace(result, strides=row_major(result.shape, order))
            step = replace(step, outputs=(result,))
        label = f"{kind} {a.shape} {a.strides} {b.shape} {b.strides} {result.strides}"
        launches = lower(step, context_of(runner, kind))
        cases.append(Case(label, step, k, lowered=launches, rounding=rounding(kind, weight=False)))
    check(runner, cases)


def test_rows_are_written_in_any_order(runner: Runner, count: int) -> None:
    """As windows of an image are, with a residual in the image's own order; the operands stay single matrices."""
    rng, cases = rng_of("rows"), []
    for i in range(max(4, count // 3)):
        kind = list(KINDS)[i % 4]
        dtype = KINDS[kind][0]
        rows = tuple(int(rng.integers(1, 6)) for _ in range(int(rng.integers(3, 6))))
        k, n = ragged(rng, 200, 8), ragged(rng, 150, int(rng.choice([1, 8])))
        store = cv.stored(cv.add(ACC, cv.arg(2, dtype)), dtype)
        inputs: list[cv.Given] = [(dtype, (*rows, k)), weight(k, n, dtype=dtype), (dtype, (*rows, n))]
        step = make_step(Gemm((store,)), inputs)
        order = (*(int(axis) for axis in rng.permutation(len(rows))), len(rows))
        residual, written = (replace(t, strides=row_major(t.shape, order)) for t in (step.inputs[2], step.outputs[0]))
        step = replace(step, inputs=(*step.inputs[:2], residual), outputs=(written,))
        context = context_of(runner, kind)
        assert product_of(step, context).batch.count == 1
        launches = lower(step, context)
        cases.append(Case(f"{kind} {rows} {order} {k=} {n=}", step, k, lowered=launches, rounding=rounding(kind)))
    check(runner, cases)


def test_gemm_of_other_types_matches_numpy(runner: Runner, count: int) -> None:
    """fp64, integers (exactly), and operands of two types."""
    rng, cases = rng_of("types"), []
    types = (
        (DType.F64, DType.F64, DType.F64), (F16, F32, F32), (F32, BF16, F32), (F32, F32, DType.F64),
        (DType.I32, DType.I32, DType.I32), (DType.I64, DType.I64, DType.I64), (DType.U8, DType.I8, DType.I32),
        (DType.I8, DType.I8, DType.I8), (DType.I64, F32, F32), (DType.U8, DType.U8, F32),
    )  # fmt: skip
    for i in range(count):
        one, other, accumulator = types[i % len(types)]
        m, k, n = (ragged(rng, 150) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 3))))
        a, b = window(rng, one, (*lead, m, k), 0), window(rng, other, (*broadcast_of(rng, lead), k, n), 1)
        addend = cv.constant(3) if accumulator is F32 else ex.Const(3, accumulator)
        step = make_step(Gemm((cv.add(ex.Acc(accumulator), addend),)), [a, b])
        feeds = {j: values(rng, tensor) for j, tensor in enumerate((a, b)) if tensor.dtype.is_int}
        cases.append(Case(f"{one} {other} {accumulator} {a.shape} {b.shape}", step, k, feeds, rounding=EXACT))
    check(runner, cases)


def values(rng: np.random.Generator, tensor: Tensor) -> np.ndarray:
    """Integers over the whole range of a narrow type, and a good part of that of a wide one."""
    info = np.iinfo(tensor.dtype.numpy)
    return rng.integers(max(info.min, -(2**20)), min(info.max, 2**20), tensor.shape).astype(tensor.dtype.numpy)


def test_gemm_over_nothing_is_its_epilogue(runner: Runner, count: int) -> None:
    cases = []
    for dtype in (F16, F32, DType.F64):
        store = cv.add(ACC, cv.arg(2, dtype)) if dtype is not DType.F64 else cv.add(ex.Acc(dtype), ex.Arg(2, dtype))
        step = make_step(Gemm((store,)), [(dtype, (5, 0)), (dtype, (0, 9)), (dtype, (9,))])
        cases.append(Case(f"{dtype}", step, 1, rounding=EXACT))
    check(runner, cases)


def window(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], number: int) -> Tensor:
    """An operand whose last or second to last axis is innermost, its other axes in any order, with gaps."""
    inner = len(shape) - (2 if shape[-2] > 1 and rng.random() < 0.5 else 1)
    axes = [int(axis) for axis in rng.permutation(len(shape)) if axis != inner] + [inner]
    whole = fed(
        dtype, tuple(size + int(rng.choice([0, 0, 1, 8])) for size in (shape[axis] for axis in axes)), -1, number
    )
    strides = dict(zip(axes, whole.strides, strict=True))
    return Tensor(whole.buffer, dtype, shape, tuple(strides[axis] for axis in range(len(shape))))


def test_gemm_of_more_tiles_than_multiprocessors(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A persistent block takes several tiles, in bands of one or several: its rings and turns wrap around."""
    monkeypatch.setattr(tiles, "_KEPT_BYTES", 0)
    cases = []
    large, small = ((3000, 1512, 200), (5000, 1000, 1096), (20000, 200, 40)), ((420, 264, 200), (900, 40, 40))
    for i, (m, n, k) in enumerate(small if isinstance(runner, EmulatedRunner) else large):
        monkeypatch.setattr(tiles, "_BAND", 1 if i % 2 else 4)
        step = make_step(Gemm((cv.BIAS_RESIDUAL,)), [(F16, (m, k)), weight(k, n), weight(n), (F16, (m, n))])
        for tile in thinned(runner, tiles_of(runner, "fp16"), first=i):
            for splits in (1, min(3, tile.most_splits)):
                launches = launched(step, replace(tile, splits=splits), runner.context)
                cases.append(Case(f"{m}x{n}x{k} {tile} in {splits}", step, k, lowered=launches, rounding=EXACT))
    check(runner, cases)


def test_consumers_take_turns_when_a_warp_is_late(hopper: Runner) -> None:
    """Tiles of a single step: nothing but their turns keeps consumers apart."""
    m, n = (700, 136) if isinstance(hopper, EmulatedRunner) else (40000, 520)
    cases = []
    for tile in (tile for tile in PRODUCT_TILES if not tile.cooperative):
        step = make_step(Gemm((stores_of(F16)["bias"],)), [(F16, (m, 40)), weight(40, n), weight(n)])
        cases.append(Case(f"{tile}", step, 40, lowered=launched(step, tile, hopper.context), rounding=EXACT))
    check_late(hopper, cases)
