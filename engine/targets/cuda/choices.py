"""Tiles of products that were timed on a device: found by the tuner (tuner.py), kept on disk (choice_file.py), and
taken by `gemm.py` in place of what the cost model says. Needs no GPU."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

from engine.targets.cuda.gemm_rows import AnyTile, RowsTile, rows_tiles
from engine.targets.cuda.gemm_stream import StreamTile, stream_tiles
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS
from engine.targets.cuda.kernel import Choice, Functor
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import (
    BATCHED_TILES,
    CLUSTER_TILES,
    MMA_TILES,
    PRODUCT_TILES,
    SHORT_TILES,
    STAGED_TILES,
    Operands,
    Tile,
    WgmmaTile,
)

_FORM = ("cooperative", "slots", "batched", "cluster_m", "cluster_n", "cluster_k")
"""What tells tiles of wgmma of the same size apart."""


def key_of(product: Product, operands: Operands, epilogue: Functor) -> str:
    """What names a product in the file: all that the choice of a tile depends on."""
    a, b, itemsize = product.a, product.b, product.dtype.itemsize
    lies = [f"{name}{'k' if x.k_inner else 'r'}{access}/{x.stride * itemsize % 128}"
            for name, x, access in (("a", a, product.a_access), ("b", b, product.b_access))]  # fmt: skip
    size = f"{product.batch.count}x{product.m}x{product.n}x{product.k}"
    stores = hashlib.sha256(epilogue.code.encode()).hexdigest()[:8]
    rows = [name for name, has in (("divided", product.divisors), ("factors", product.factors)) if has is not None]
    return " ".join([operands.name.lower(), product.dtype.value, size, *lies, *rows, stores])


def choice_of(tile: AnyTile, us: float) -> Choice:
    """A tile as the file has it, with the time that it took."""
    if isinstance(tile, StreamTile):
        return {"kernel": "stream", **asdict(tile), "us": us}
    if isinstance(tile, RowsTile):
        return {"kernel": "rows", **asdict(tile), "us": us}
    kernel = "wgmma" if isinstance(tile, WgmmaTile) else "mma"
    choice: dict[str, str | int | float | bool] = {
        "kernel": kernel, "m": tile.m, "n": tile.n, "splits": tile.splits, "us": us,
    }  # fmt: skip
    if isinstance(tile, WgmmaTile):
        choice |= {"aligns": tile.aligns, **{name: getattr(tile, name) for name in _FORM}}
    return choice


def tile_text(tile: AnyTile) -> str:
    """A tile for people."""
    if isinstance(tile, StreamTile):
        parts = f", {tile.parts} times" if tile.parts > 1 else ""
        return f"slices of {32 * tile.groups} columns{parts}"
    if isinstance(tile, RowsTile):
        parts = f", k in {tile.splits}" if tile.splits > 1 else ""
        parts += f" of clusters of {tile.cluster}" if tile.cluster > 1 else ""
        return f"rows, {tile.columns} columns, {tile.warps} warps, {tile.stages} steps under way{parts}"
    kernel = "wgmma" if isinstance(tile, WgmmaTile) else "mma"
    turns = " cooperative" if isinstance(tile, WgmmaTile) and tile.cooperative else ""
    copied = ", rows copied" if isinstance(tile, WgmmaTile) and tile.aligns else ""
    if isinstance(tile, WgmmaTile) and tile.batched:
        kernel = "wgmma, matrices in turn,"
    staged = ", results staged" if isinstance(tile, WgmmaTile) and tile.slots else ""
    if isinstance(tile, WgmmaTile) and tile.cluster > 1:
        staged += f", in pairs along {'m' if tile.cluster_m > 1 else 'n'}"
    parts = f", k in {tile.splits}" if tile.splits > 1 else ""
    if isinstance(tile, WgmmaTile) and tile.cluster_k > 1:
        parts = f", k in a cluster of {tile.cluster_k}"
    return f"{kernel} {tile.m}×{tile.n}{turns}{parts}{copied}{staged}"


def divides(product: Product, tile: AnyTile) -> bool:
    """Whether rows of the first operand are divided in a tile, if they have to be: in all but some of wgmma; elsewhere
    the epilogue does it."""
    return product.divisors is None or not isinstance(tile, WgmmaTile) or tile.divides_rows


def tile_of(choice: Choice, product: Product, operands: Operands) -> AnyTile | None:
    """The tile that a choice names, if it is one for such a product."""
    kernel, splits, aligns = choice.get("kernel"), choice.get("splits"), choice.get("aligns")
    if kernel == "stream":
        return next((tile for tile in stream_tiles(product, operands) if asdict(tile).items() <= choice.items()), None)
    if kernel == "rows":
        return next((tile for tile in rows_tiles(product) if asdict(tile).items() <= choice.items()), None)
    wgmma = (*PRODUCT_TILES, *STAGED_TILES, *SHORT_TILES, *CLUSTER_TILES, *BATCHED_TILES, *JOINED_PRODUCTS)
    tiles: tuple[Tile, ...] = wgmma if kernel == "wgmma" else MMA_TILES if kernel == "mma" else ()
    fitting = [t for t in tiles if (t.m, t.n) == (choice.get("m"), choice.get("n"))]
    named = [choice.get(name) for name in _FORM]
    tile = next((t for t in fitting if [getattr(t, name, None) for name in _FORM] == named), None)
    if tile is None or type(splits) is not int or not 1 <= splits <= tile.most_splits:
        return None
    tile = replace(tile, splits=splits)
    if not divides(product, tile):
        return None
    if not isinstance(tile, WgmmaTile):
        return tile
    if type(aligns) is not bool:
        return None
    if tile.batched:
        fits = product.suits_tma_batched and not aligns
    else:
        lies_right = product.suits_tma and operands is not Operands.REFINED
        fits = product.suits_tma_aligned if aligns else lies_right
    return replace(tile, splits=splits, aligns=aligns) if fits else None
