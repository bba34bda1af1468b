"""Tiles that were timed on a device: how they are kept, and that products take them. Needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cli import main
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.choice_file import ChoiceFile
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.covering import ACC, F16, make_step, stored, weight
from engine.targets.cuda.gemm import parts_of, pick_tile, ranked_in, ranked_tiles
from engine.targets.cuda.gemm_stream import stream_tiles
from engine.targets.cuda.kernel import Context, Functor, WeightStore
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import MMA_TILES, PRODUCT_TILES, Operands, WgmmaTile

HOPPER = Context(ARCHITECTURES["sm_90a"], 132, WeightStore())
HALF = Operands.HALF


def parts(m: int, n: int, k: int, dtype: DType = F16, store: ex.Expr = ACC) -> tuple[Product, Functor]:
    found = parts_of(make_step(Gemm((store,)), [(dtype, (m, k)), weight(k, n, dtype=dtype)]), HOPPER)
    assert found is not None
    return found


def product(m: int, n: int, k: int, dtype: DType = F16) -> Product:
    return parts(m, n, k, dtype)[0]


def key(m: int, n: int, k: int, dtype: DType = F16, store: ex.Expr = ACC) -> str:
    one, epilogue = parts(m, n, k, dtype, store)
    return key_of(one, HALF, epilogue)


def test_a_choice_names_its_tile() -> None:
    aligned = product(100, 100, 512)
    for tile in (*PRODUCT_TILES, *MMA_TILES):
        for splits in (1, tile.most_splits):
            split = replace(tile, splits=splits)
            assert tile_of(choice_of(split, 1.0), aligned, HALF) == split
            assert json.loads(json.dumps(choice_of(split, 1.0))) == choice_of(split, 1.0)
    texts = {tile_text(tile) for tile in (*PRODUCT_TILES, *MMA_TILES, replace(PRODUCT_TILES[0], aligns=True))}
    assert len(texts) == len(PRODUCT_TILES) + len(MMA_TILES) + 1


def test_a_choice_names_slices() -> None:
    wide = product(9000, 384, 32)
    tiles = stream_tiles(wide, HALF)
    assert [(tile.groups, tile.parts) for tile in tiles] == [(6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    assert all(tile_of(choice_of(tile, 1.0), wide, HALF) == tile for tile in tiles)
    assert len({tile_text(tile) for tile in tiles}) == len(tiles)
    assert all(tile_of(choice_of(tile, 1.0), product(9000, 384, 72), HALF) is None for tile in tiles)


def test_slices_take_rows_that_begin_at_multiples_of_four_bytes() -> None:
    """One word at a time, and results whose rows begin anywhere; rows at odd elements they leave to others."""

    def kinds(n: int, k: int) -> set[tuple[bool, bool]]:
        return {(tile.narrow, tile.shifted) for tile in stream_tiles(product(9000, n, k), HALF)}

    assert kinds(96, 32) == {(False, False)}
    assert kinds(81, 32) == {(False, True)}
    assert kinds(96, 26) == {(True, False)}
    assert kinds(81, 26) == {(True, True)}
    assert not kinds(81, 27)


def test_a_choice_for_another_product_is_not_taken() -> None:
    odd, aligned = product(100, 100, 511), product(100, 100, 512)
    as_it_lies, copied = PRODUCT_TILES[0], replace(PRODUCT_TILES[0], aligns=True)
    assert tile_of(choice_of(as_it_lies, 1.0), odd, HALF) is None
    assert tile_of(choice_of(copied, 1.0), odd, HALF) == copied
    assert tile_of({"kernel": "stream", "us": 1.0}, aligned, HALF) is None
    assert tile_of({"kernel": "stream", "us": 1.0}, product(9000, 64, 32), HALF) is None
    for damaged in (
        {}, {"kernel": "wgmma"}, {**choice_of(as_it_lies, 1.0), "splits": 99}, {**choice_of(as_it_lies, 1.0), "n": 7},
        {**choice_of(as_it_lies, 1.0), "aligns": "no"},
    ):  # fmt: skip
        assert tile_of(damaged, aligned, HALF) is None


def test_a_product_in_two_parts_is_always_copied() -> None:
    as_it_lies, copied = PRODUCT_TILES[0], replace(PRODUCT_TILES[0], aligns=True)
    refined = product(100, 100, 512, DType.F32)
    assert tile_of(choice_of(as_it_lies, 1.0), refined, Operands.REFINED) is None
    assert tile_of(choice_of(copied, 1.0), refined, Operands.REFINED) == copied
    ranked = ranked_tiles(refined, replace(HOPPER, tf32=True))
    assert all(one.tile.aligns for one in ranked if isinstance(one.tile, WgmmaTile))


def test_products_that_differ_have_other_keys() -> None:
    keys = [key(100, 100, k) for k in (512, 520, 511)]
    keys += [key(100, 100, 512, DType.BF16), key(100, 100, 512, store=stored(ACC))]
    assert len(set(keys)) == len(keys)
    assert key(100, 100, 512) == key(100, 100, 512)


def test_a_product_takes_what_was_timed() -> None:
    one, epilogue = parts(4096, 768, 768)
    ranked = ranked_tiles(one, HOPPER)
    assert [r.estimate.cycles for r in ranked] == sorted(r.estimate.cycles for r in ranked)
    assert pick_tile(one, epilogue, HOPPER) == ranked[0].tile
    timed = replace(HOPPER, choices={key(4096, 768, 768): choice_of(ranked[4].tile, 9.0)})
    assert pick_tile(one, epilogue, timed) == ranked[4].tile != ranked[0].tile
    assert pick_tile(*parts(4096, 768, 776), timed) == pick_tile(*parts(4096, 768, 776), HOPPER)


@pytest.mark.parametrize(("m", "n", "k", "shares"), [(128, 768, 3072, True), (1384, 360, 8000, False)])
def test_clusters_share_k_where_that_should_be_clearly_faster(m: int, n: int, k: int, shares: bool) -> None:
    one, epilogue = parts(m, n, k)
    (joined, *_), (single, *_) = ranked_in(Way.JOINED, one, epilogue, HOPPER), ranked_tiles(one, HOPPER)
    assert joined.estimate.cycles < single.estimate.cycles
    assert pick_tile(one, epilogue, HOPPER) == (joined if shares else single).tile


def test_rows_are_copied_where_the_copy_engine_cannot_read_them() -> None:
    tiles = [ranked.tile for ranked in ranked_tiles(product(4096, 768, 767), HOPPER)]
    hopper = [tile for tile in tiles if isinstance(tile, WgmmaTile)]
    assert isinstance(tiles[0], WgmmaTile) and hopper and all(tile.aligns for tile in hopper)
    assert not ranked_tiles(product(4096, 768, 768), HOPPER)[0].tile.aligns


def test_choices_outlive_the_process(tmp_path: Path) -> None:
    file = ChoiceFile(tmp_path / "tiles", "NVIDIA H100 80GB HBM3", "580.95.05")
    assert file.read() == {}
    file.add({"a": choice_of(PRODUCT_TILES[0], 1.5)})
    file.add({"b": choice_of(MMA_TILES[0], 2.5)})
    again = ChoiceFile(tmp_path / "tiles", "NVIDIA H100 80GB HBM3", "580.95.05")
    assert again.read() == {"a": choice_of(PRODUCT_TILES[0], 1.5), "b": choice_of(MMA_TILES[0], 2.5)}
    assert ChoiceFile(tmp_path / "tiles", "NVIDIA H100 80GB HBM3", "590.1").read() == {}
    assert ChoiceFile(tmp_path / "tiles", "NVIDIA A100", "580.95.05").read() == {}
    assert file.path is not None
    for damaged in ("{", "[1]", '{"a": 3}'):
        file.path.write_text(damaged, encoding="utf-8")
        assert file.read() == {}


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tiles").write_text("a file where the folder should be", encoding="utf-8")
    ChoiceFile(tmp_path / "tiles", "gpu", "1").add({"a": choice_of(MMA_TILES[0], 1.0)})
    assert "are not kept" in caplog.text
    ChoiceFile(None, "gpu", "1").add({"a": choice_of(MMA_TILES[0], 1.0)})


def test_a_cpu_has_nothing_to_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    graph = onnx.parser.parse_graph("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    assert main(["tune", str(path), "--device", "cpu", "--explain"]) == 2
    assert "nothing to choose on a CPU" in capsys.readouterr().err
