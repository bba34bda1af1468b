"""Products against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.tensor import Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.gemm import epilogue_of, launch_product, lower, product_of
from engine.targets.cuda.kernel import Context
from engine.targets.cuda.tiles import MMA_TILES, WGMMA_TILES
from tests.engine.targets.cuda.cases import check, fed, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner

BF16 = DType.BF16
KINDS = {"fp16": (F16, False), "bf16": (BF16, False), "tf32": (F32, True), "fp32": (F32, False)}
"""Kinds of operands: (dtype, whether fp32 is rounded to tf32)."""
EXACT, TF32 = 2.0**-21, 2.0**-11
"""How operands are taken: as they are (fp32 loses its last bits), or rounded to tf32."""


def stores_of(dtype: DType) -> Mapping[str, ex.Expr]:
    """Epilogues whose operands and results are of `dtype`."""
    biased = cv.add(ACC, cv.arg(2, dtype))
    return {
        "bias": cv.stored(biased, dtype),
        "bias gelu": cv.stored(cv.gelu(biased), dtype),
        "residual": cv.stored(cv.add(biased, cv.arg(3, dtype)), dtype),
        "plain": ACC,
    }


def rounding(kind: str) -> float:
    return TF32 if kind == "tf32" else EXACT


def context_of(runner: Runner, kind: str) -> Context:
    return replace(runner.context, tf32=KINDS[kind][1])


def test_gemm_of_every_kind_with_weight_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("kinds"), []
    for i in range(count):
        kind, tile = list(KINDS)[i % 4], MMA_TILES[int(rng.integers(0, len(MMA_TILES)))]
        dtype, name = KINDS[kind][0], list(stores_of(F16))[int(rng.integers(0, 4))]
        m, k, n = ragged(rng, 300), ragged(rng, 500), ragged(rng, 300)
        a = fed(dtype, (m, k), inner=-1 if i % 8 < 4 else -2, number=0)
        inputs: list[cv.Given] = [a, weight(k, n, dtype=dtype)]
        inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
        inputs += [(dtype, (m, n))] if name == "residual" else []
        store = stores_of(dtype)[name]
        step, context = make_step(Gemm((store,)), inputs), context_of(runner, kind)
        launch = launch_product(product_of(step, context), epilogue_of(step, (store,), (0, 1), n), tile, context)
        cases.append(Case(f"{kind} {m}x{n}x{k} {name} {tile}", step, k, lowered=[launch], rounding=rounding(kind)))
    check(runner, cases)


def test_gemm_of_every_kind_of_activations_matches_float64(runner: Runner, count: int) -> None:
    """Batches that broadcast in any way, operands in any layout, sizes of one."""
    rng, cases = rng_of("layouts"), []
    for i in range(2 * count):
        kind = list(KINDS)[i % 4]
        dtype = KINDS[kind][0]
        m, k, n = (1 if rng.random() < 0.1 else ragged(rng, 150, int(rng.choice([1, 2, 8]))) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 5))))
        a = window(rng, dtype, (*broadcast(rng, lead), m, k), 0)
        b = window(rng, dtype, (*broadcast(rng, lead), k, n), 1)
        step = make_step(Gemm((cv.stored(ACC, dtype),)), [a, b])
        label = f"{kind} {a.shape} {a.strides} {b.shape} {b.strides}"
        launches = lower(step, context_of(runner, kind))
        cases.append(Case(label, step, k, lowered=launches, rounding=rounding(kind)))
    check(runner, cases)


def broadcast(rng: np.random.Generator, lead: tuple[int, ...]) -> tuple[int, ...]:
    """`lead` with some sizes 1 and some left out."""
    sizes = tuple(1 if rng.random() < 0.3 else size for size in lead)
    return sizes[int(rng.integers(0, len(lead) + 1)) if rng.random() < 0.3 else 0 :]


def window(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], number: int) -> Tensor:
    """An operand whose last or second to last axis is innermost, its other axes in any order, with gaps."""
    inner = len(shape) - (2 if shape[-2] > 1 and rng.random() < 0.5 else 1)
    axes = [int(axis) for axis in rng.permutation(len(shape)) if axis != inner] + [inner]
    whole = fed(
        dtype, tuple(size + int(rng.choice([0, 0, 1, 8])) for size in (shape[axis] for axis in axes)), -1, number
    )
    strides = dict(zip(axes, whole.strides, strict=True))
    return Tensor(whole.buffer, dtype, shape, tuple(strides[axis] for axis in range(len(shape))))


def test_gemm_with_weight_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("gemm"), []
    tiles = [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]
    for i in range(count):
        tile = tiles[i % len(tiles)]
        aligned = tile in WGMMA_TILES or rng.random() < 0.6
        m, k, n = (
            ragged(rng, 700),
            ragged(rng, 900, 8 if aligned else 1),
            ragged(rng, 500, 8 if rng.random() < 0.6 else 1),
        )
        name = list(stores_of(F16))[i % 4]
        inputs: list[cv.Given] = [(F16, (m, k)), weight(k, n)]
        inputs += [] if name == "plain" else [weight(n)]
        inputs += [(F16, (m, n))] if name == "residual" else []
        step = make_step(Gemm((stores_of(F16)[name],)), inputs)
        launch = launch_product(
            product_of(step, runner.context),
            epilogue_of(step, (stores_of(F16)[name],), (0, 1), n),
            tile,
            runner.context,
        )
        cases.append(Case(f"{m}x{n}x{k} {name}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_more_tiles_than_multiprocessors(runner: Runner, count: int) -> None:
    """A persistent block takes several tiles: its rings and turns wrap around."""
    cases = []
    large, small = ((3000, 1512, 200), (5000, 1000, 1096), (20000, 200, 40)), ((420, 264, 200), (900, 40, 40))
    for m, n, k in small if isinstance(runner, EmulatedRunner) else large:
        step = make_step(Gemm((cv.BIAS_RESIDUAL,)), [(F16, (m, k)), weight(k, n), weight(n), (F16, (m, n))])
        product, epilogue = product_of(step, runner.context), epilogue_of(step, (cv.BIAS_RESIDUAL,), (0, 1), n)
        for tile in [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]:
            launch = launch_product(product, epilogue, tile, runner.context)
            cases.append(Case(f"{m}x{n}x{k} {tile}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_activations_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("batch"), []
    for i in range(count):
        m, k, n = (ragged(rng, 200, 8 if rng.random() < 0.5 else 1) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 3))))
        b_lead = lead if i % 3 else lead[1:]
        b = fed(F16, (*b_lead, k, n), inner=-2 if i % 2 else -1)
        step = make_step(Gemm((cv.stored(ACC),)), [(F16, (*lead, m, k)), b])
        cases.append(Case(f"{lead}{m}x{n}x{k} b{b_lead}", step, k))
    check(runner, cases)
