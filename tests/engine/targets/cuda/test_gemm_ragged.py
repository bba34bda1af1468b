"""Products on wgmma whose results have rows that begin anywhere and pass through shared memory (kernels/mma/
ragged_stores.cuh), against float64; which products they are for; and what their kernel would be without its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.choices import choice_of, key_of
from engine.targets.cuda.covering import ACC, F16, F32, arg, make_step, mul, stored, weight
from engine.targets.cuda.gemm import launches_of, operands_of, other_tiles, pick_tile, stages
from engine.targets.cuda.gemm_wgmma import is_dense
from engine.targets.cuda.kernel import Pointer, RowMatrix
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import CLUSTER_TILES, STAGED_TILES, WgmmaTile
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT, KINDS, context_of, launched, rounding
from tests.engine.targets.cuda.test_gemm_staged import HOPPER, parts, step_of
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip

BF16 = DType.BF16


def test_products_of_ragged_rows_match_float64(hopper: Runner, count: int) -> None:
    """In every tile: every kind of operands, rows that begin at every multiple of 2 bytes, first operands copied or
    not."""
    rng, cases = rng_of("ragged rows"), []
    for i in range(3 * count):
        tile = replace(STAGED_TILES[i % len(STAGED_TILES)], aligns=i % 3 == 0)
        kind = ("fp16", "bf16", "tf32")[int(rng.integers(0, 3))]
        result = F16 if kind == "tf32" else KINDS[kind][0]
        name = ("plain", "bias", "bias gelu")[int(rng.integers(0, 3))]
        m, n = ragged(rng, 500), ragged(rng, 400)
        n += n % 8 == 0
        k = ragged(rng, 300, 1 if tile.aligns else 8)
        step = step_of(m, n, k, name, result, KINDS[kind][0])
        launches = launched(step, tile, context_of(hopper, kind))
        assert "gemm_ragged.cuh" in launches[-1].kernel.source.text
        cases.append(Case(f"{kind} {m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=rounding(kind)))
    check(hopper, cases)


def test_ragged_rows_of_every_width(hopper: Runner) -> None:
    """Fewer columns than a sector has, ends in every panel, and just behind one."""
    cases = []
    for i, n in enumerate((1, 2, 3, 7, 9, 15, 17, 31, 33, 62, 63, 65, 81, 94, 97, 113, 127, 129, 161, 191, 193, 257)):
        tile = STAGED_TILES[i % len(STAGED_TILES)]
        step = step_of(70, n, 24, ("plain", "bias")[i % 2], (F16, BF16)[i // 2 % 2])
        cases.append(Case(f"{n} {tile}", step, 24, lowered=launched(step, tile, hopper.context), rounding=EXACT))
    check(hopper, cases)


def test_ragged_rows_of_more_tiles_than_multiprocessors(hopper: Runner) -> None:
    """Rings wrap around, and a consumer uses its shared memory anew for every tile."""
    cases = []
    sizes = (
        ((420, 265, 200), (900, 41, 40))
        if isinstance(hopper, EmulatedRunner)
        else ((3000, 1513, 200), (20001, 203, 40))
    )
    for i, (m, n, k) in enumerate(sizes):
        for j, tile in enumerate(STAGED_TILES):
            step = step_of(m, n, k, ("bias gelu", "plain")[(i + j) % 2])
            launches = launched(step, tile, hopper.context)
            cases.append(Case(f"{m}x{n}x{k} {tile}", step, k, lowered=launches, rounding=EXACT))
    check(hopper, cases)
    if isinstance(hopper, EmulatedRunner):
        with hopper.in_reverse():
            check(hopper, cases)


def test_ragged_rows_may_lie_apart(hopper: Runner) -> None:
    """The result is a window of a wider matrix that begins anywhere: what lies around it stays as it was."""
    cases = []
    for i, tile in enumerate(STAGED_TILES):
        m, n, k, dtype = 150, 71 + 9 * i, 72, (F16, BF16)[i % 2]
        step = step_of(m, n, k, "plain", dtype)
        (result,) = step.outputs
        line = n + 20 + i
        buffer = Buffer(result.buffer.name, result.buffer.kind, (m * line + 8) * 2)
        step = replace(step, outputs=(replace(result, buffer=buffer, strides=(line, 1), offset=1 + i % 8),))
        cases.append(Case(f"{tile}", step, k, lowered=launched(step, tile, hopper.context), rounding=EXACT))
    check(hopper, cases)


WRONG = {
    "what reaches into the next panel is lost": ("store_shared_16(own, carried);", ""),
    "nobody waits for a panel to be written": (
        "__syncwarp();\n        store_panel(", "store_panel(",
    ),
    "the end of a row is left out": ("if (part == 1) wanted = last", "if (part == 1) wanted = false && last"),
    "what is left of a row is left out": (" : panel + 1 == RAGGED_PANELS;", " : false;"),
    "the beginning of a row is left out": ("? panel == 0 && row.begin > half :", "? false :"),
    "a last odd column is left out": ("store_half(x % 2 == 0 && x < last, place, v, x);", ""),
    "four columns are left out": ("x % 4 == 0 && x + 4 <= last;", "false;"),
}  # fmt: skip
DENSE = {
    "columns that there are not overwrite the next row": ("count = c < columns ? columns - c : 0;", "count = 2;"),
    "nobody waits for the rows to be written": ("__syncwarp();\n#pragma unroll 4", "#pragma unroll 4"),
    "half of the rows are stored": ("min(16u, layout.rows - first_row)", "min(8u, layout.rows - first_row)"),
}  # fmt: skip
"""Kernels that are wrong: what stands in their source, and instead of it."""


@pytest.mark.parametrize("what", WRONG)
def test_the_emulator_shows_what_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulator_or_skip()
    step = step_of(90, 203, 72, "bias")
    tile = next(tile for tile in STAGED_TILES if tile.n == 128 and tile.m == 64)
    launches = launched(step, tile, runner.context)
    assert "constexpr bool dense = 0;" in launches[0].kernel.source.text
    check_is_caught(runner, Case(what, step, 72, lowered=launches, rounding=EXACT), WRONG[what], monkeypatch)


@pytest.mark.parametrize("what", DENSE)
def test_the_emulator_shows_what_is_wrong_with_dense_rows(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulator_or_skip()
    step = step_of(90, 75, 72, "bias")
    launches = launched(step, next(tile for tile in STAGED_TILES if tile.n == 128 and tile.m == 64), runner.context)
    assert "constexpr bool dense = 1;" in launches[0].kernel.source.text
    check_is_caught(runner, Case(what, step, 72, lowered=launches, rounding=EXACT), DENSE[what], monkeypatch)


def test_rows_are_dense_where_they_are_one_piece_of_memory() -> None:
    tile = next(tile for tile in STAGED_TILES if tile.n == 128 and tile.m == 64)
    result = RowMatrix(Pointer(Buffer("result", BufferKind.OUTPUT, 1 << 20)), 75)
    assert is_dense(result, 75, tile) and is_dense(replace(result, stride=127), 127, tile)
    assert not is_dense(result, 74, tile), "a gap between rows"
    assert not is_dense(replace(result, stride=129), 129, tile), "two tiles"
    narrow = WgmmaTile(128, 160, 5, cooperative=True, slots=3)
    assert is_dense(replace(result, stride=95), 95, narrow)
    assert not is_dense(replace(result, stride=97), 97, narrow), "no room"
    assert not is_dense(result, 75, WgmmaTile(128, 128, 5, slots=2)), "no registers"


def test_which_products_of_ragged_rows_pass_through_shared_memory() -> None:
    for name in ("plain", "bias", "bias gelu"):
        _, epilogue = parts(step_of(300, 401, 384, name))
        assert epilogue.staged is not None and epilogue.staged.ragged
    a, rows = (F16, (300, 384)), (F16, (300, 401))
    for stores, inputs in (
        ((ACC,), [a, weight(384, 401)]),
        ((stored(mul(ACC, arg(2))),), [a, weight(384, 401), rows]),
        ((stored(mul(ACC, arg(2, F32))),), [a, weight(384, 401), (F32, (300, 1))]),
    ):
        assert parts(make_step(Gemm(stores), inputs))[1].staged is None
    product, epilogue = parts(step_of(300, 401, 384, "plain"))
    assert all(stages(product, epilogue, tile) for tile in STAGED_TILES)
    assert not any(stages(product, epilogue, tile) for tile in CLUSTER_TILES if tile.slots)
    assert {one.tile for one in other_tiles(product, epilogue, HOPPER)[Way.STAGED]} == set(STAGED_TILES)
    assert not any(one.tile.slots for one in other_tiles(product, epilogue, HOPPER)[Way.CLUSTER])


@pytest.mark.parametrize(("m", "n", "k"), [(7641, 1002, 62), (4688, 7773, 1301), (1300, 965, 904), (14363, 1001, 64)])
def test_many_ragged_rows_are_taken_through_shared_memory(m: int, n: int, k: int) -> None:
    product, epilogue = parts(step_of(m, n, k, "plain"))
    tile = pick_tile(product, epilogue, HOPPER)
    assert tile == other_tiles(product, epilogue, HOPPER)[Way.STAGED][0].tile
    assert "gemm_ragged.cuh" in launches_of(product, epilogue, tile, HOPPER)[-1].kernel.source.text


def test_a_tile_of_staged_rows_is_not_taken_where_it_cannot_be() -> None:
    """A file's choice of a cluster with staged results, which ragged rows do not have."""
    product, epilogue = parts(step_of(4096, 1001, 768, "plain"))
    staged_pair = next(tile for tile in CLUSTER_TILES if tile.slots)
    key = key_of(product, operands_of(product, HOPPER), epilogue)
    context = replace(HOPPER, choices={key: choice_of(staged_pair, 9.0)})
    assert pick_tile(product, epilogue, context) == pick_tile(product, epilogue, HOPPER)
