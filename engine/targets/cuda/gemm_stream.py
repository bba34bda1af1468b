"""Products of many rows with few columns and a short k (gemm_stream.cuh): 1×1 convolutions of large images with few
channels. They are bound by memory, and tiles of one step of k leave it idle. Called by `gemm.py`."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from engine.targets.cuda.kernel import I64, STORAGE, Context, Functor, Instruction, Launch, ceildiv, launch
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import MmaTile, Operands, Tile, mma_cycles, wgmma_cycles

_THREADS = 256
_SLICE = 16  # rows of a warp
_GROUP = 32  # columns that four lanes hold
_MOST_COLUMNS = 256
_MOST_BYTES = 64  # of k: 16 bytes a lane. A tile of wgmma would be half empty


@dataclass(frozen=True)
class StreamTile:
    """All columns of a slice of rows, in `groups` of 32; a lane loads `words` of 4 bytes of a row at once. `refined`:
    the columns are multiplied in two parts."""

    groups: int
    words: int
    refined: bool = False

    @property
    def blocks(self) -> int:
        """Resident beside each other: three, but where a lane holds so much that registers would not do."""
        return 2 if self.refined and self.words == 4 else 3

    @property
    def shared_bytes(self) -> int:
        return self.groups * self.words * 32 * 16 * (1 + self.refined)

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "groups": self.groups, "words": self.words, "threads": _THREADS, "blocks": self.blocks,
            "shared_bytes": self.shared_bytes, "refined": self.refined,
        }  # fmt: skip


def stream_tile(product: Product, operands: Operands) -> StreamTile | None:
    """How the kernel takes a product, if it can: operands that are read 16 bytes at once, and a k that registers hold.
    fp32 is rounded to tf32, or split."""
    k_bytes = product.k * operands.itemsize
    if (
        not product.suits_tma
        or operands is Operands.EXACT
        or operands.itemsize == 1
        or k_bytes > _MOST_BYTES
        or product.n > _MOST_COLUMNS
    ):
        return None
    return StreamTile(ceildiv(product.n, _GROUP), 2 if k_bytes <= 32 else 4, operands is Operands.REFINED)


_LAUNCH = 1900
"""Cycles until the first slices have come and the last results are gone, as tiles of wgmma need."""
_MEMORY_RATE = 1294
"""Bytes a cycle of the GPU, as fitted for tiles of wgmma."""
_PIECE, _SLICE_OVERHEAD = 60, 60
"""Instructions of a warp to finish 8 rows of 32 columns, and those of a slice beside them (counted in machine code for
bias and ReLU6)."""
_ISSUED = 2.2  # instructions a cycle of a multiprocessor with so many warps
_WAIT = 900  # cycles until a slice has come from memory
_ELEMENT = 0.29
"""Cycles an element of a tile of wgmma whose k is one step, so that there is little but its epilogue: 0.27 to 0.31 in
1×1 convolutions 16→96 and 24→144 of batch 128 on an H100 (242 and 120 µs)."""


def stream_cycles(product: Product, tile: StreamTile, multiprocessors: int, itemsize: int) -> float:
    """Estimated cycles in slices."""
    slices = ceildiv(product.m, _SLICE)
    instructions = 2 * tile.groups * _PIECE + _SLICE_OVERHEAD + tile.groups * tile.words * (4 if tile.refined else 3)
    issue = ceildiv(slices, multiprocessors) * instructions / _ISSUED
    warps = multiprocessors * tile.blocks * _THREADS // 32
    wait = ceildiv(slices, warps) * (_WAIT + 100 * tile.groups)
    return _LAUNCH + hypot(max(issue, wait), _touched(product, itemsize) / _MEMORY_RATE)


def tile_cycles(product: Product, tile: Tile, multiprocessors: int, operands: Operands) -> float:
    """Estimated cycles in tiles of the other kernels, for a k of one step."""
    m, n, k = product.m, product.n, product.k
    memory = _touched(product, operands.itemsize) / _MEMORY_RATE
    if isinstance(tile, MmaTile):
        return hypot(mma_cycles(m, n, k, 1, tile, multiprocessors, operands), memory)
    rounds = ceildiv(ceildiv(m, tile.m) * ceildiv(n, tile.n), multiprocessors)
    finishing = _LAUNCH + hypot((rounds - 1) * tile.m * tile.n * _ELEMENT, memory)
    return max(wgmma_cycles(m, n, k, tile, multiprocessors, operands), finishing if tile.splits == 1 else 0)


def _touched(product: Product, itemsize: int) -> int:
    return itemsize * (product.m * (product.k + product.n) + product.k * product.n)


def streams_faster(product: Product, slices: StreamTile, tile: Tile, operands: Operands, multiprocessors: int) -> bool:
    """Whether slices should beat `tile`, one of the other kernels."""
    cycles = stream_cycles(product, slices, multiprocessors, operands.itemsize)
    return cycles < tile_cycles(product, tile, multiprocessors, operands)


def launch_stream(product: Product, epilogue: Functor, tile: StreamTile, context: Context) -> Launch:
    """The launch of a product in slices: as many blocks as are resident, or fewer where there are not so many rows."""
    blocks = min(context.multiprocessors * tile.blocks, ceildiv(product.m, _SLICE * _THREADS // 32))
    return launch(
        "gemm",
        "gemm_stream.cuh",
        {**tile.config, "operand": STORAGE[product.dtype]},
        [epilogue],
        {
            "a": product.a.pointer, "a_stride": I64(product.a.stride),
            "b": product.b.pointer, "b_stride": I64(product.b.stride),
            "m": product.m, "n": product.n, "k": product.k,
        },
        (blocks, 1, 1),
        _THREADS,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip
