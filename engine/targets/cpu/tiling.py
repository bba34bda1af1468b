"""Host side of the tile kernels: how columns become panels, rows become tasks, operands become arguments.

Called by `gemm.py` and `conv.py` when a step is lowered; `codegen/tile.py` is the device side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cpu.codegen.isa import Isa
from engine.targets.cpu.codegen.tile import Epilogue, EpilogueArg, TileSpec, tile_rows, tile_vectors
from engine.targets.cpu.kernel import Context, Launch, Pointer, Slot, launch, table

# Measured on a Zen 4 core with 1 MB of second-level cache: flat between 128 and 384 KB of rows per block.
ROWS_CACHE_BYTES = 256 * 1024
# A part of a panel that stays in the second-level cache while all rows of a block pass over it.
PANEL_CACHE_BYTES = 384 * 1024
# Tiles per block where rows are read by one panel only: nothing is used again, and the table stays in the first cache.
_TILES_OF_ONE_PANEL = 2
# Bytes a core gets per cycle when it streams what it does not find in its second-level cache, and the cost of taking a
# task, in cycles. Only their order of magnitude matters.
_STREAM_BYTES = 12.0
_TASK_CYCLES = 400.0
# Multiply-adds of a task at most: some 15 ms of a core with 32 of them per cycle. Whoever waits for a program in the
# background to give way waits for a task.
_MOST_PER_TASK = 1 << 30


@dataclass(frozen=True)
class Panels:
    """`count` panels of vectors of `widths` lanes, from column `start` on; vectors from `masked` on may hang over."""

    widths: tuple[int, ...]
    start: int
    count: int
    masked: int

    @property
    def width(self) -> int:
        return sum(self.widths)


@lru_cache(maxsize=4096)
def panels_of(isa: Isa, dtype: DType, columns: int, known: bool) -> tuple[Panels, ...]:
    """How `columns` are cut into panels. `known`: the number of columns belongs to the weights, so that kernels may be
    made for it; otherwise one pair of kernels serves every number."""
    lanes = isa.lanes_of(dtype.itemsize)
    full = tile_vectors(isa)
    count, rest = divmod(columns, full * lanes)
    parts = [Panels((lanes,) * full, 0, count, full)] if count else []
    start = count * full * lanes
    if not rest:
        return tuple(parts)
    if not known:
        return (*parts, Panels((lanes,) * full, start, 1, 0))
    vectors = -(-rest // lanes)
    if isa.registers < 32 and vectors == 1 and count:
        # One vector more in the last panel beats a panel of a single vector, which has too few sums in flight.
        parts = [Panels((lanes,) * full, 0, count - 1, full)] if count > 1 else []
        start, vectors, rest = start - full * lanes, full + 1, rest + full * lanes
    widths = [lanes] * vectors
    if isa.lanes >= 16 and 0 < rest - (vectors - 1) * lanes <= lanes // 2:
        widths[-1] = lanes // 2  # half the work where a wide vector is two operations, as on Zen 4
    whole = sum(widths) == rest
    return (*parts, Panels(tuple(widths), start, 1, len(widths) if whole else len(widths) - 1))


def packed(matrix: np.ndarray, parts: Sequence[Panels]) -> np.ndarray:
    """``matrix[batch, depth, columns]`` as ``[batch][panel][depth][width]``, the panels of `parts` one after the other,
    columns beyond the last filled with zeros."""
    batch, depth, _ = matrix.shape
    pieces = []
    for part in parts:
        piece = matrix[:, :, part.start : part.start + part.count * part.width]
        missing = part.count * part.width - piece.shape[2]
        if missing:
            piece = np.pad(piece, ((0, 0), (0, 0), (0, missing)))
        piece = piece.reshape(batch, depth, part.count, part.width).transpose(0, 2, 1, 3)
        pieces.append(piece.reshape(batch, -1))
    return np.concatenate(pieces, axis=1)


@lru_cache(maxsize=65536)
def task_grid(
    rows: int,
    panels: int,
    width: int,
    depth: int,
    itemsize: int,
    row_bytes: int,
    batches: int,
    lanes: int,
    tile: int,
    threads: int,
) -> tuple[int, int]:
    """(row chunks, panel groups) for one batch: what makes the estimated time shortest.

    A task multiplies its rows by its panels; it streams its panels once per block of rows, and its rows once.
    """
    if threads == 1:
        return 1, 1
    block = max(tile, ROWS_CACHE_BYTES // max(1, row_bytes))
    best, choice = float("inf"), (1, 1)
    most_chunks = -(-rows // tile)
    chunk_counts = sorted({min(most_chunks, c) for c in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 4 * threads, 8 * threads)})
    group_counts = sorted({min(panels, g) for g in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, panels)})
    for chunks, groups in product(chunk_counts, group_counts):
        task_rows, task_panels = rows / chunks, -(-panels // groups)
        multiply = task_rows * task_panels * depth * width / lanes
        panel_bytes = task_panels * width * depth * itemsize
        stream = (-(-task_rows // block) * panel_bytes + task_rows * row_bytes) / _STREAM_BYTES
        # What is streamed is fetched ahead, for the most part.
        task = multiply + 0.3 * stream + _TASK_CYCLES
        tasks = batches * chunks * groups
        # Threads that come late or are stolen: the last task of each round is waited for.
        time = task * (-(-tasks // threads)) + 0.25 * task
        if time < best:
            best, choice = time, (chunks, groups)
    return choice


@dataclass(frozen=True)
class Operand:
    """A tensor with its byte strides along the batch axes and the rows."""

    name: str
    pointer: Pointer
    strides: tuple[int, ...]


def merge_axes(sizes: Sequence[int], operands: Sequence[Operand]) -> tuple[tuple[int, ...], list[Operand]]:
    """Axes of size 1 dropped and neighbours that lie together for every operand merged; the last axis stays apart from
    the others only where it must. At least one axis remains."""
    keep = [i for i, size in enumerate(sizes) if size != 1] or [len(sizes) - 1]
    merged: list[int] = []
    last: list[int] = []
    for axis in keep:
        if last and all(o.strides[last[-1]] == o.strides[axis] * sizes[axis] for o in operands):
            merged[-1] *= sizes[axis]
            last[-1] = axis
        else:
            merged.append(sizes[axis])
            last.append(axis)
    return tuple(merged), [Operand(o.name, o.pointer, tuple(o.strides[i] for i in last)) for o in operands]


def batch_tables(sizes: Sequence[int], operands: Sequence[Operand]) -> dict[str, Slot]:
    """The tables of byte offsets of every operand, one entry per index of the batch axes `sizes`."""
    indices = np.indices(tuple(sizes)).reshape(len(sizes), prod(sizes))
    return {
        f"{o.name}.batch": table(np.asarray(o.strides[: len(sizes)], np.int64) @ indices if len(sizes) else [0])
        for o in operands
    }


def epilogue_of(
    op: Op, stores: tuple[ex.Expr, ...], inputs: Sequence[Tensor], shape: tuple[int, ...], order: Sequence[int]
) -> tuple[Epilogue, list[tuple[Tensor, tuple[int, ...]]]]:
    """The epilogue of an operator, and for each input that it reads the tensor and its byte strides along the axes of
    `shape` in `order`, whose last axis is that of the columns."""
    used = ex.arguments(*stores)
    args: list[EpilogueArg] = []
    tensors: list[tuple[Tensor, tuple[int, ...]]] = []
    for index in used:
        tensor = inputs[index]
        missing = len(shape) - len(tensor.shape)
        if missing < 0:
            raise UnsupportedOp(f"{op.name}: an epilogue input of shape {tensor.shape} for an output of shape {shape}")
        itemsize = tensor.dtype.itemsize
        own = [0 if size == 1 else s * itemsize for size, s in zip(tensor.shape, tensor.strides, strict=True)]
        strides = [0] * missing + own
        along = tuple(0 if shape[axis] == 1 else strides[axis] for axis in order)
        args.append(EpilogueArg(tensor.dtype, bool(along[-1]), any(along[:-1])))
        tensors.append((tensor, along))
    numbers = {index: i for i, index in enumerate(used)}
    return Epilogue(tuple(ex.renumber(store, numbers) for store in stores), tuple(args)), tensors


def row_strides(epilogue: Epilogue, operands: Sequence[Operand]) -> tuple[Epilogue, dict[str, Slot]]:
    """The epilogue with `rows` set as the last axis of the operands says, and the row strides of those that move."""
    by_name = {o.name: o for o in operands}
    args = tuple(
        EpilogueArg(arg.dtype, arg.columns, by_name[f"arg{i}"].strides[-1] != 0) for i, arg in enumerate(epilogue.args)
    )
    result = Epilogue(epilogue.stores, args)
    return result, {f"{name}.row": by_name[name].strides[-1] for name, _, _, rows in result.tensors if rows}


@dataclass(frozen=True)
class Product:
    """A matrix product to launch: `sizes` are those of the batch axes and of the rows, `operands` lie along them
    ("a", "b", outputs, epilogue inputs). The reduction has `depth` elements, in `segments` of `inner`; where it is
    split because it is long, in `split_segments`. `packs`: the second operand is packed by the tasks. `slots` are
    arguments of the family's own. `row_bytes` is what a row adds to the working set, `scratch_per_row` what it needs
    of scratch.
    """

    dtype: DType
    sizes: tuple[int, ...]
    columns: int
    depth: int
    segments: int
    inner: int
    operands: Sequence[Operand]
    epilogue: Epilogue
    slots: Mapping[str, Slot]
    packs: bool = False
    split_segments: int = 0
    row_bytes: int = 0
    scratch_per_row: int = 0


SpecMaker = Callable[[Panels, bool, bool, Epilogue], TileSpec]


def launches(
    product: Product,
    parts: Sequence[Panels],
    make: SpecMaker,
    move_second: Callable[[Panels, int], int],
    context: Context,
    concurrent: bool = False,
) -> list[Launch]:
    """One launch per part, side by side. `make(part, split, batched, epilogue)` gives the kernel, `move_second(part,
    bytes before it)` the bytes from the start of the second operand to that part. `concurrent`: beside the launch
    before."""
    *batch, rows = product.sizes
    batches = prod(batch)
    itemsize = product.dtype.itemsize
    epilogue, row_slots = row_strides(product.epilogue, product.operands)
    tables = batch_tables(batch, product.operands) if batches > 1 else {}
    moves = {name: dtype.itemsize if columns else 0 for name, dtype, columns, _ in epilogue.tensors}
    result: list[Launch] = []
    before = 0
    for part in parts:
        tile = tile_rows(context.isa, len(part.widths))
        panel_bytes = product.depth * part.width * itemsize
        split = product.split_segments > 1 and panel_bytes > PANEL_CACHE_BYTES and rows > tile
        segments = product.split_segments if split else product.segments
        spec = make(part, split, batches > 1, epilogue)
        chunks, groups = task_grid(
            rows, part.count, part.width, product.depth, itemsize, product.row_bytes, batches,
            context.isa.lanes_of(itemsize), tile, context.threads,
        )  # fmt: skip
        if product.packs:
            # Every chunk of rows packs anew: more of them only where there are too few panels to go round.
            chunks = chunks if batches * part.count < context.threads else 1
            groups = max(groups, min(part.count, -(-part.count * panel_bytes // PANEL_CACHE_BYTES)))
        per_task = -(-rows // chunks) * -(-part.count // groups) * part.width * product.depth
        chunks = min(-(-rows // tile), chunks * max(1, -(-per_task // _MOST_PER_TASK)))
        block = max(1, ROWS_CACHE_BYTES // max(1, product.row_bytes) // tile) * tile
        if part.count == 1:
            block = min(block, _TILES_OF_ONE_PANEL * tile)
        block = min(block, -(-rows // chunks))
        tiles = -(-block // tile)
        patches = _aligned(tiles * segments * tile * 8)
        partials = _aligned(patches + tiles * tile * product.scratch_per_row)
        packed_at = partials + (_aligned(tiles * tile * part.width * itemsize) if split else 0)
        scratch = packed_at + (-(-part.count // groups) * panel_bytes if product.packs else 0)
        slots: dict[str, Slot] = {**tables, **row_slots, **product.slots}
        for operand in product.operands:
            offset = move_second(part, before) if operand.name == "b" else moves.get(operand.name, 0) * part.start
            slots[operand.name] = replace(operand.pointer, offset=operand.pointer.offset + offset)
        slots |= {
            "rows": rows, "chunks": chunks, "block_rows": block, "panels": part.count, "groups": groups,
            "panel_bytes": panel_bytes, "segments": segments, "inner": product.inner,
            "segments_per_block": max(1, PANEL_CACHE_BYTES // max(1, product.inner * part.width * itemsize)),
            "columns": product.columns - part.start, "patches": patches, "partials": partials, "packed": packed_at,
        }  # fmt: skip
        arguments = {name: slots[name] for name in spec.parameters}
        result.append(launch(spec, arguments, batches * chunks * groups, scratch, concurrent or bool(result)))
        before += part.count * panel_bytes
    return result


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@lru_cache(maxsize=64)
def _zeros_buffer(nbytes: int) -> Buffer:
    return Buffer("zeros", BufferKind.PLAN, nbytes, np.zeros(nbytes, np.uint8))


def zeros(nbytes: int) -> Pointer:
    """At least so many bytes of zeros."""
    return Pointer(_zeros_buffer(1 << max(12, nbytes.bit_length())))
