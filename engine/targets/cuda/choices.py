"""Tiles of products that were timed on a device: found by the tuner (tuner.py), kept on disk, and taken by `gemm.py` in
place of what the cost model says. Needs no GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engine.targets.cuda.gemm_stream import AnyTile, StreamTile, stream_tile
from engine.targets.cuda.kernel import Choice, Functor
from engine.targets.cuda.product import Product
from engine.targets.cuda.source import expand
from engine.targets.cuda.tiles import (
    BATCHED_TILES,
    CLUSTER_TILES,
    MMA_TILES,
    PRODUCT_TILES,
    STAGED_TILES,
    Operands,
    Tile,
    WgmmaTile,
)

log = logging.getLogger(__name__)

_KERNELS = (
    "gemm_wgmma.cuh", "gemm_staged.cuh", "gemm_cluster.cuh", "gemm_cluster_staged.cuh", "gemm_batch.cuh",
    "gemm_mma.cuh", "gemm_stream.cuh", "align_rows.cuh", "split_rows.cuh", "row_factors.cuh",
)  # fmt: skip

_FORM = ("cooperative", "slots", "batched", "cluster_m", "cluster_n")
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
        return {"kernel": "stream", "us": us}
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
        return f"slices of {32 * tile.groups} columns"
    kernel = "wgmma" if isinstance(tile, WgmmaTile) else "mma"
    turns = " cooperative" if isinstance(tile, WgmmaTile) and tile.cooperative else ""
    copied = ", rows copied" if isinstance(tile, WgmmaTile) and tile.aligns else ""
    if isinstance(tile, WgmmaTile) and tile.batched:
        kernel = "wgmma, matrices in turn,"
    staged = ", results staged" if isinstance(tile, WgmmaTile) and tile.slots else ""
    if isinstance(tile, WgmmaTile) and tile.cluster > 1:
        staged += f", in pairs along {'m' if tile.cluster_m > 1 else 'n'}"
    return f"{kernel} {tile.m}×{tile.n}{turns}{f', k in {tile.splits}' if tile.splits > 1 else ''}{copied}{staged}"


def tile_of(choice: Choice, product: Product, operands: Operands) -> AnyTile | None:
    """The tile that a choice names, if it is one for such a product."""
    kernel, splits, aligns = choice.get("kernel"), choice.get("splits"), choice.get("aligns")
    if kernel == "stream":
        return None if product.divisors is not None else stream_tile(product, operands)
    wgmma = (*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES, *BATCHED_TILES)
    tiles: tuple[Tile, ...] = wgmma if kernel == "wgmma" else MMA_TILES if kernel == "mma" else ()
    fitting = [t for t in tiles if (t.m, t.n) == (choice.get("m"), choice.get("n"))]
    named = [choice.get(name) for name in _FORM]
    tile = next((t for t in fitting if [getattr(t, name, None) for name in _FORM] == named), None)
    if tile is None or type(splits) is not int or not 1 <= splits <= tile.most_splits:
        return None
    tile = replace(tile, splits=splits)
    if product.divisors is not None and not (isinstance(tile, WgmmaTile) and tile.divides_rows):
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
    return replace(tile, aligns=aligns) if fits else None


class ChoiceFile:
    """The choices for one device with one driver and the kernels as they are. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None, device: str, driver: str) -> None:
        sources = expand("".join(f'#include "{name}"\n' for name in _KERNELS))
        tiles = repr((PRODUCT_TILES, STAGED_TILES, CLUSTER_TILES, BATCHED_TILES, MMA_TILES))
        digest = hashlib.sha256("\0".join([sources, tiles, driver]).encode()).hexdigest()[:16]
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.path = folder and folder / f"{name}-{digest}.json"

    def read(self) -> dict[str, Choice]:
        """What is there; nothing where there is no such file, or a damaged one."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: choice for key, choice in content.items() if isinstance(choice, dict)}

    def add(self, found: Mapping[str, Choice]) -> None:
        """Keep more choices. A folder that cannot be written is said in the log."""
        if self.path is None:
            return
        text = json.dumps({**self.read(), **found}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Written beside, then renamed: who reads meanwhile finds the old file or the new one.
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
                beside = Path(file.name)
                try:
                    file.write(text)
                    file.flush()
                    os.replace(beside, self.path)
                except OSError:
                    beside.unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("the tuner's choices are not kept: %s", error)
