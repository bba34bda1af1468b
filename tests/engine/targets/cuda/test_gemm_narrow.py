"""Slices of rows that begin at multiples of 4 bytes only, against float64."""

from __future__ import annotations

import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.targets.cuda import covering as cv
from engine.targets.cuda import gemm
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.choices import choice_of, tile_of, tile_text
from engine.targets.cuda.covering import F16, F32, make_step, stored, weight
from engine.targets.cuda.gemm import operands_of, other_tiles, parts_of, pick_tile
from engine.targets.cuda.gemm_stream import narrow_stream_tile, stream_tile
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.product import Product, product_of
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import Operands
from tests.engine.targets.cuda.cases import check, fed, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import KINDS, context_of, launched, rounding, stores_of

HOPPER = Context(SM_90A, 132, WeightStore())


def test_narrow_slices_match_float64(runner: Runner, count: int) -> None:
    """Every kind of operands; any even number of halves, any number of fp32, a row of k."""
    rng, cases = rng_of("narrow"), []
    for i in range(2 * count):
        kind = list(KINDS)[i % 3]
        dtype, unit = KINDS[kind][0], 4 // KINDS[kind][0].itemsize
        k = unit * int(rng.choice([words for words in range(1, 16) if words % 4]))  # whole vectors are aligned
        m, n = 1 + ragged(rng, 4000), int(rng.integers(1, 257))  # a single row is no distance from another
        name = list(stores_of(F16))[i % 4]
        inputs: list[cv.Given] = [fed(dtype, (m, k), -1, 0), weight(k, n, dtype=dtype)]
        inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
        inputs += [(dtype, (m, n))] if name == "residual" else []
        step, context = make_step(Gemm((stores_of(dtype)[name],)), inputs), context_of(runner, kind)
        product = product_of(step, context)
        tile = narrow_stream_tile(product, operands_of(product, context))
        assert tile is not None and tile.narrow and stream_tile(product, operands_of(product, context)) is None
        label = f"{kind} {m}x{n}x{k} {name} {tile}"
        cases.append(Case(label, step, k, lowered=launched(step, tile, context), rounding=rounding(kind)))
    check(runner, cases)


def product(m: int, n: int, k: int, dtype: DType = F16) -> Product:
    return product_of(make_step(Gemm((stored(cv.ACC, dtype),)), [(dtype, (m, k)), weight(k, n, dtype=dtype)]), HOPPER)


def test_which_rows_are_narrow() -> None:
    assert narrow_stream_tile(product(9000, 81, 26), Operands.HALF) is not None
    assert narrow_stream_tile(product(9000, 81, 32), Operands.HALF) is None, "16 bytes at once"
    assert narrow_stream_tile(product(9000, 81, 27), Operands.HALF) is None, "half a word"
    assert narrow_stream_tile(product(9000, 81, 34), Operands.HALF) is None, "more than 64 bytes"
    assert narrow_stream_tile(product(9000, 300, 26), Operands.HALF) is None, "many columns"
    assert narrow_stream_tile(product(9000, 81, 13, F32), Operands.TF32) is not None
    assert narrow_stream_tile(product(9000, 81, 13, F32), Operands.EXACT) is None


def test_narrow_slices_are_not_chosen_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(Gemm((stored(cv.ACC),)), [(F16, (14363, 26)), weight(26, 81)])
    parts = parts_of(step, HOPPER)
    assert parts is not None
    (ranked,) = other_tiles(*parts, HOPPER)[Way.NARROW]
    chosen = pick_tile(*parts, HOPPER)
    assert chosen != ranked.tile
    assert tile_of(choice_of(ranked.tile, 1.0), parts[0], Operands.HALF) == ranked.tile
    assert tile_of(choice_of(ranked.tile, 1.0), product(9000, 81, 32), Operands.HALF) is None
    assert "narrow" in tile_text(ranked.tile)
    monkeypatch.setattr(gemm, "CHOSEN_BY_MODEL", frozenset({Way.NARROW}))
    assert pick_tile(*parts, HOPPER) == ranked.tile
