"""Tiles of convolutions that were timed on a device: found by the tuner (tuner.py), kept on disk (choice_file.py), and
taken by `conv_tiles.py` in place of what the cost models say. Needs no GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeAlias, TypeVar

from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvMax
from engine.plan.plan import Step
from engine.targets.cuda.conv_block_tiles import Apart, BlockTile
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_halo import HaloTile
from engine.targets.cuda.conv_halo_deep import DeepTile
from engine.targets.cuda.conv_lines import LinesTile
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_stem import StemTile
from engine.targets.cuda.conv_stem_pooled import PooledStemTile
from engine.targets.cuda.depthwise import DepthwiseTile
from engine.targets.cuda.depthwise_bands import BandedRows
from engine.targets.cuda.depthwise_diagonal import DiagonalRows
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.kernel import Choice, Context, is_constant
from engine.targets.cuda.tiles import MmaTile, WgmmaTile

ConvTile: TypeAlias = (
    MmaTile | WgmmaTile | HaloTile | DeepTile | LinesTile | StemTile | PooledStemTile | DepthwiseTile | RowsTile
    | BlockTile | Apart
)  # fmt: skip
T = TypeVar("T", bound=ConvTile)

_KINDS: dict[str, type[ConvTile]] = {
    "mma": MmaTile, "gathered": WgmmaTile, "halo": HaloTile, "deep halo": DeepTile, "lines": LinesTile,
    "stem": StemTile, "pooled stem": PooledStemTile, "depthwise": DepthwiseTile, "depthwise rows": DiagonalRows,
    "depthwise bands": BandedRows, "block": BlockTile, "apart": Apart,
}  # fmt: skip
"""The kernels, by what a choice calls them."""


def key_of(step: Step, bare: Step, context: Context) -> str:
    """What names a step's convolution in the file: all that the choice of a tile depends on. `bare`: the step without
    what it does beside the convolution, a mean or squeeze-and-excite layers."""
    op, geometry, weights = bare.op, Geometry(bare), bare.inputs[1]
    assert isinstance(op, Conv)
    kind = type(step.op).__name__.lower() + (" transposed" if op.transposed else "")
    if isinstance(step.op, ConvMax):
        kind += f" {step.op.pool.kernel} {step.op.pool.pads}"
    rounding = " tf32" if context.tf32 and weights.dtype is DType.F32 else ""
    known = "" if is_constant(weights) else " computed"
    sizes = {
        "": (geometry.images, geometry.groups * geometry.channels, *geometry.input),
        "g": (geometry.groups, geometry.n), "k": geometry.kernel, "s": geometry.op_strides, "p": geometry.pads,
        "d": geometry.op_dilations, "o": geometry.output, "x": (*geometry.x_strides, geometry.x_channel),
    }  # fmt: skip
    shape = " ".join(name + "x".join(map(str, values)) for name, values in sizes.items())
    stores = hashlib.sha256(epilogue_for(bare, geometry.n).code.encode()).hexdigest()[:8]
    return f"{kind}{rounding}{known} {geometry.x_dtype.value} {weights.dtype.value} {shape} {stores}"


def block_key(convolutions: Sequence[Step], context: Context) -> str:
    """What names an inverted residual, by its convolutions."""
    return f"block of {', '.join(key_of(one, one, context) for one in convolutions)}"


def choice_of(tile: ConvTile, us: float) -> Choice:
    """A tile as the file has it, with the time that it took."""
    kernel = next(name for name, kind in _KINDS.items() if type(tile) is kind)
    return {"kernel": kernel, **asdict(tile), "us": us}


def chosen_among(ranked: Sequence[T], choice: Choice) -> T | None:
    """The tile that a choice names, if it is one of those that a step can run in."""
    fields = {name: value for name, value in choice.items() if name not in ("kernel", "us")}
    kind = _KINDS.get(str(choice.get("kernel")))
    try:
        named = kind(**fields) if kind is not None else None  # type: ignore[arg-type]  # a file's: any fields
    except TypeError:
        return None
    return next((tile for tile in ranked if type(tile) is kind and tile == named), None)


def kernel_of(tile: ConvTile) -> str:
    """The kernel that a tile is of; of gathered patches also how the sums and the results go."""
    name = next(name for name, kind in _KINDS.items() if type(tile) is kind)
    if not isinstance(tile, WgmmaTile):
        return name
    pairs = " in pairs" if tile.cluster > 1 else ""
    return f"{name}{pairs}" + (
        " joined" if tile.cluster_k > 1 else " split" if tile.splits > 1 else " staged" if tile.slots else ""
    )


def tile_text(tile: ConvTile) -> str:
    """A tile for people."""
    size = f"{tile.m}×{tile.n}" if isinstance(tile, MmaTile | WgmmaTile | HaloTile | DeepTile) else ""
    match tile:
        case MmaTile():
            return f"mma {size}{_splits(tile.splits)}"
        case WgmmaTile():
            turns = " cooperative" if tile.cooperative else ""
            joined = f", k in a cluster of {tile.cluster_k}" if tile.cluster_k > 1 else ""
            staged = ", results staged" if tile.slots else ""
            pairs = f", in pairs along {'m' if tile.cluster_m > 1 else 'n'}" if tile.cluster > 1 else ""
            return f"gathered {size}{turns}{_panels(tile.panel_bytes)}{_splits(tile.splits)}{joined}{staged}{pairs}"
        case HaloTile():
            return f"halo {size}{_first(tile.swapped)}, {tile.stages} halos"
        case DeepTile():
            rings = f"{tile.halos} halos, {tile.stages} filters"
            return f"deep halo {size}{_first(tile.swapped)}, {rings}{_panels(tile.panel_bytes)}"
        case LinesTile():
            return f"lines 2×{tile.wide} pixels × 64, {tile.stages} tiles' pixels"
        case StemTile():
            size = f"{tile.rows}×{8 * tile.units} pixels × {tile.columns}"
            warps = ", on wgmma" if tile.wgmma else ""
            return f"stem {size}, {tile.blocks} blocks a multiprocessor{warps}"
        case PooledStemTile():
            return f"pooled stem {tile.windows}×28 windows × {8 * tile.n_blocks}, {tile.blocks} blocks a multiprocessor"
        case DepthwiseTile():
            pixels = f"{tile.bands}·{tile.rows}×{8 * tile.units} pixels"
            images = f" of {tile.images} images" if tile.images > 1 else ""
            return f"depthwise {pixels}{images} × {tile.channels}, {tile.stages} windows"
        case BlockTile():
            images = f" of {tile.images} images" if tile.images > 1 else ""
            rows = f"{tile.each} rows a warp, panels of {tile.panel} channels"
            return f"block {tile.rows}×{tile.columns} pixels{images}, {rows}"
        case Apart():
            return "three convolutions"
        case RowsTile():
            ring = f"{tile.stages}·{tile.rows} rows of {tile.pixels} pixels × {tile.panel}"
            bands = " bands" if isinstance(tile, BandedRows) else ""
            return f"depthwise{bands} {ring}, {tile.streams} streams, {tile.blocks} blocks"


def _splits(splits: int) -> str:
    return f", k in {splits}" if splits > 1 else ""


def _panels(panel_bytes: int) -> str:
    return f", panels of {panel_bytes} bytes" if panel_bytes != 128 else ""


def _first(swapped: bool) -> str:
    return ", filters first" if swapped else ""
