"""Products of many rows with few columns or a short k (gemm_stream.cuh): 1×1 convolutions of large images with few
channels. They are bound by memory, and tiles of one step of k leave it idle. Called by `gemm.py`."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from engine.targets.cuda.kernel import I64, STORAGE, Context, Functor, Instruction, Launch, Reads, ceildiv, launch
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import NOTHING, MmaTile, Operands, Tile, mma_cycles, wgmma_cycles

_SLICE = 16  # rows of a warp
_GROUP = 32  # columns that four lanes hold
_MOST_COLUMNS, _MOST_GROUPS = 1024, 8  # of a product; of a block
_MOST_BYTES = 128  # of k. A tile of wgmma would be half empty, or have a single step
_THREADS = 256


@dataclass(frozen=True)
class StreamTile:
    """A slice of rows and `groups` of 32 columns, of which the product has `parts` times as many; a lane has `words` of
    4 bytes of a row, which come one by one where rows are `narrow`. `refined`: the columns are multiplied in two
    parts. `shifted`: rows of the result begin anywhere."""

    groups: int
    words: int
    refined: bool = False
    parts: int = 1
    narrow: bool = False
    shifted: bool = False

    @property
    def blocks(self) -> int:
        """Resident beside each other: three, but where a lane holds so much that registers would not do (the gate shows
        spills)."""
        return 2 if self.words > 4 or (self.words == 4 and self.refined) or self.shifted else 3

    @property
    def held(self) -> bool:
        """Whether lanes keep what the epilogue reads that is the same in every row: they have registers for it where
        blocks have so few columns (the gate shows spills)."""
        return self.groups == 1 or (self.groups == 2 and (self.words != 4 or self.refined))

    @property
    def shared_bytes(self) -> int:
        return self.groups * self.words * 32 * 16 * (1 + self.refined)

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "groups": self.groups, "words": self.words, "threads": _THREADS, "blocks": self.blocks,
            "shared_bytes": self.shared_bytes, "refined": self.refined, "held": self.held,
            "narrow": self.narrow,
        }  # fmt: skip


def stream_tiles(product: Product, operands: Operands) -> list[StreamTile]:
    """The ways in which the kernel takes a product, if it can: rows that begin at multiples of 4 bytes, columns that
    are read 16 bytes at once, and a k that registers hold. Blocks have as many columns each: where some had none to
    multiply it took up to 40 % longer on an H100 (16→96 at batch 128). fp32 is rounded to tf32, or split."""
    k_bytes, groups = product.k * operands.itemsize, ceildiv(product.n, _GROUP)
    if (
        not product.suits_tma_aligned
        or product.a_access < 4
        or operands is Operands.EXACT
        or operands.itemsize == 1
        or k_bytes > _MOST_BYTES
        or product.n > _MOST_COLUMNS
    ):
        return []
    words, refined = ceildiv(k_bytes, 32) * 2, operands is Operands.REFINED
    counts = [count for count in range(_MOST_GROUPS, 0, -1) if groups % count == 0]
    narrow, shifted = product.a_access < 16, product.n % 8 != 0
    return [StreamTile(count, words, refined, groups // count, narrow, shifted) for count in counts]


_LAUNCH = 1900
"""Cycles until the first slices have come and the last results are gone, as tiles of wgmma need."""
_MEMORY_RATE, _MEET = 1600, 4
"""Bytes a cycle of the GPU, and how the time of memory adds to that of instructions: as in a norm of so high an order.
With these 32→16, 16→96, 24→144 and 40→240 at batch 128, linear, with ReLU6 and with SiLU, are 1 to 10 % off what an
H100 took (25 to 142 µs)."""
_PIECE, _PIECE_ELEMENTS, _SLICE_OVERHEAD = 40, 5.2, 60
"""Instructions of a warp to finish 8 rows of 32 columns, those for each that the epilogue has for an element, and those
of a slice beside them (counted in machine code for bias with ReLU6 and with SiLU)."""
_ISSUED, _ISSUED_HELD = 2.2, 2.6
"""Instructions a cycle of a multiprocessor with so many warps; where lanes hold what is the same in every row,
and take all groups together: 40→240 with SiLU at batch 128 took 24.5 µs in blocks of two groups on an H100, 26 to 30 in
those of four or eight, and 27.7 in those of one."""
_COLD = 500
"""Cycles in which the first slice waits for what the epilogue reads of each group, elsewhere: 16→96 with SiLU at
batch 1 took 5.0 µs in blocks of three groups on an H100, and 3.2 in those of one."""
_CACHE_RATE = 5000  # bytes a cycle from the L2 cache, where rows come again for other columns
_SHARED_RATE = 128  # bytes a cycle from shared memory
_WAIT = 900  # cycles until a slice has come from memory
_SHIFTED = 2.2
"""What rows of the result that begin anywhere make of the time: 18 ways of nine products took 1.2 to 3.2 times as long
on an H100 as estimated without it."""
_ELEMENT = 0.29
"""Cycles an element of a tile of wgmma whose k is one step, so that there is little but its epilogue: 0.27 to 0.31 in
1×1 convolutions 16→96 and 24→144 of batch 128 on an H100 (242 and 120 µs)."""


def stream_cycles(
    product: Product, tile: StreamTile, multiprocessors: int, itemsize: int, reads: Reads = NOTHING
) -> float:
    """Estimated cycles in slices. `reads`: of the epilogue."""
    slices, warps, blocks = ceildiv(product.m, _SLICE), _THREADS // 32, _blocks(product, tile, multiprocessors)
    pieces = 2 * tile.groups * (_PIECE + _PIECE_ELEMENTS * reads.instructions)
    instructions = pieces + _SLICE_OVERHEAD + tile.groups * tile.words * (4 if tile.refined else 3)
    rounds, rest = divmod(slices, blocks * warps)
    # Of the multiprocessor with most: every round is of all blocks, the last of some.
    most = rounds * ceildiv(blocks * tile.parts, multiprocessors)
    most += ceildiv(ceildiv(rest, warps) * tile.parts, multiprocessors)
    rate, cold = (_ISSUED_HELD, 0) if tile.held else (_ISSUED, tile.groups * _COLD)
    issue = most * warps * max(instructions / rate, tile.shared_bytes / _SHARED_RATE)
    wait = ceildiv(slices, blocks * warps) * (_WAIT + 100 * tile.groups)
    more = product.m * product.n * (reads.varying - reads.by_row) / 2  # registers of eight columns
    memory = (_touched(product, itemsize) + more) / _MEMORY_RATE
    memory += (tile.parts - 1) * product.m * product.k * itemsize / _CACHE_RATE
    steady: float = (max(issue, wait) ** _MEET + memory**_MEET) ** (1 / _MEET)
    return (_LAUNCH + cold + steady) * (_SHIFTED if tile.shifted else 1)


def _blocks(product: Product, tile: StreamTile, multiprocessors: int) -> int:
    """Of each part of the columns: as many as are resident, or fewer where there are not so many rows."""
    return min(max(1, multiprocessors * tile.blocks // tile.parts), ceildiv(product.m, _SLICE * _THREADS // 32))


def tile_cycles(product: Product, tile: Tile, multiprocessors: int, operands: Operands) -> float:
    """Estimated cycles in tiles of the other kernels, for a k of one step."""
    m, n, k = product.m, product.n, product.k
    memory = _touched(product, operands.itemsize) / _MEMORY_RATE
    if isinstance(tile, MmaTile):
        return hypot(mma_cycles(m, n, k, 1, tile, multiprocessors, operands), memory)
    rounds = ceildiv(ceildiv(m, tile.m) * ceildiv(n, tile.n), multiprocessors)
    finishing = _LAUNCH + hypot(rounds * tile.m * tile.n * _ELEMENT, memory)
    return max(wgmma_cycles(m, n, k, tile, multiprocessors, operands), finishing if tile.splits == 1 else 0)


def _touched(product: Product, itemsize: int) -> int:
    return itemsize * (product.m * (product.k + product.n) + product.k * product.n)


def launch_stream(product: Product, epilogue: Functor, tile: StreamTile, context: Context) -> Launch:
    """The launch of a product in slices."""
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
        (_blocks(product, tile, context.multiprocessors), tile.parts, 1),
        _THREADS,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip
