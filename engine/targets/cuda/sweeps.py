"""How the kernels of norms and reductions walk over what they reduce, and how they share the walk among threads and
blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import hypot

from engine.targets.cuda.kernel import Context, ceildiv
from engine.targets.cuda.spaces import Operand, by_stride, column_group, innermost

BLOCK_THREADS = 256
BLOCKS_PER_MULTIPROCESSOR = 2
VECTORS_PER_PART = 4 * BLOCK_THREADS  # of a row split over blocks, at least
STEPS_PER_PART = 16  # of a thread in such a part, where columns are kept


@dataclass(frozen=True)
class Sweep:
    """How a kernel walks over what it reduces: one result a `kept` row (and a column, where the columns are kept), over
    `steps` and, where they are reduced, `columns`. Axes, outermost first."""

    kept: tuple[int, ...]
    steps: tuple[int, ...]
    columns: tuple[int, ...]
    columns_kept: bool

    @property
    def rows(self) -> tuple[int, ...]:
        """The row axes of the space: steps run fastest."""
        return (*self.kept, *self.steps)


def sweep(sizes: Sequence[int], reduced: Sequence[int], reads: Sequence[Operand], others: Sequence[Operand]) -> Sweep:
    """The walk in which neighbouring threads touch neighbouring memory of most `reads`, and the fewest steps."""
    if not sizes:
        return Sweep((), (), (), True)
    inner = innermost(sizes, reads)
    # The order in memory of the operand that moves along most axes.
    main = max(reads, key=lambda operand: sum(stride != 0 for stride in operand.strides)).strides
    along = [axis for axis in by_stride(reduced, main) if axis != inner]
    kept = [axis for axis in by_stride([a for a in range(len(sizes)) if a not in reduced], main) if axis != inner]
    columns_kept = inner not in reduced
    group = column_group(sizes, [*(kept if columns_kept else along), inner], [*reads, *others])
    rest = [[axis for axis in axes if axis not in group] for axes in (kept, along)]
    return Sweep(tuple(rest[0]), tuple(rest[1]), tuple(group), columns_kept)


@dataclass(frozen=True)
class Parts:
    """A walk split over `count` blocks, `size` each."""

    count: int
    size: int


def split(size: int, least: int, blocks: int, context: Context) -> Parts:
    """A walk of `size` in parts of at least `least`, where there are too few `blocks` to fill the GPU."""
    wanted = ceildiv(BLOCKS_PER_MULTIPROCESSOR * context.multiprocessors, blocks)
    part = ceildiv(size, max(1, min(wanted, size // least)))
    return Parts(max(1, ceildiv(size, part)) if part else 1, part)


@dataclass(frozen=True)
class ColumnTile:
    """How a block's threads lie over kept rows, steps and columns."""

    kept_threads: int
    row_threads: int
    column_threads: int

    @property
    def threads(self) -> int:
        return self.kept_threads * self.row_threads * self.column_threads

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "kept_threads": self.kept_threads, "row_threads": self.row_threads, "column_threads": self.column_threads,
        }  # fmt: skip


def column_tile(kept: int, steps: int, chunks: int) -> ColumnTile:
    """Warps along the columns as far as these reach, then steps to share, then more columns, then kept rows."""
    columns = power_of_two(chunks)
    row_threads = min(BLOCK_THREADS // min(32, columns), power_of_two(steps))
    column_threads = min(columns, BLOCK_THREADS // row_threads)
    kept_threads = min(BLOCK_THREADS // (row_threads * column_threads), power_of_two(kept))
    return ColumnTile(kept_threads, row_threads, column_threads)


def power_of_two(count: int) -> int:
    """The least one that is not less: few distinct kernels."""
    return 1 << (max(1, count) - 1).bit_length()


@dataclass(frozen=True)
class ColumnWalk:
    """How `threads` of a block lie over kept rows, steps and vectors of columns (some may be left over), and how blocks
    share the steps (`parts`) and the columns (`column_tiles`)."""

    threads: int
    kept_threads: int
    row_threads: int
    column_threads: int
    column_tiles: int
    tiles: int
    """Of kept rows and columns: the blocks for each part."""
    parts: Parts
    batch: int
    """Loads of a thread under way at once."""


_MOST_BATCH = {4: 8, 8: 4}
"""Loads of a thread under way at once, by the bytes of a value: what registers hold of eight values a load."""


def batch_of(steps: int, value_bytes: int) -> int:
    """The loads under way at once of a thread that takes so many `steps`: few distinct kernels."""
    return min(power_of_two(steps), _MOST_BATCH[value_bytes])


_MOST_PARTS = 64
_WAIT = 900
"""Cycles until a batch of loads of a thread has come from memory (an H100 needs 700 to 1100)."""
_ROUND = 80  # to halve the threads that share a column: a barrier, shared memory there and back
_JOIN = 3000
"""Cycles until the last block knows that it is the last and has read what the others left."""
_BLOCK_RATE, _TOTAL_RATE = 40, 1600
"""Bytes a cycle that a multiprocessor, and the GPU, read (measured with copies on an H100)."""
_REGISTERS, _PER_LOAD = 40, 4
"""Registers of a thread, and those more for each load of a batch (of fp16, in the machine code for sm_90a)."""
_ALL_REGISTERS = 65536  # of a multiprocessor
_INSTRUCTIONS, _OF_A_LOAD = 150, 28
"""Of a warp, beside its loads, and for each of them: address, eight conversions and additions (counted there, too)."""
_ISSUED = 2.2  # instructions a cycle of a multiprocessor (gemm_stream.py)


@lru_cache(maxsize=4096)  # hundreds of candidates, and a model has few distinct shapes
def pick_column_walk(
    kept: int, steps: int, chunks: int, vector_bytes: int, value_bytes: int, multiprocessors: int, shared: bool = True
) -> ColumnWalk:
    """The walk with the least estimated time over `steps` rows of `chunks` vectors for each of `kept` rows, where
    columns are kept; unless `shared`, blocks share no steps. Blocks that read less than 32 bytes side by side (a sector
    of the caches) would read it twice."""
    least = min(chunks, max(1, 32 // vector_bytes))
    walks = (
        _column_walk(kept, steps, chunks, column_threads, threads, wanted, value_bytes)
        for threads in (BLOCK_THREADS, 2 * BLOCK_THREADS)
        for column_threads in _column_threads(chunks, least)
        for wanted in (_part_counts(steps) if shared else [1])
    )
    return min(walks, key=lambda walk: column_walk_cycles(walk, vector_bytes, multiprocessors))


def _column_threads(chunks: int, least: int) -> list[int]:
    """Vectors of columns side by side in a block: `least` to a warp, and even shares of all where these are few."""
    even = {ceildiv(chunks, count) for count in range(1, 33)}
    return sorted(count for count in even | {1, 2, 4, 8, 16, 32} if least <= count <= min(chunks, 32))


def _part_counts(steps: int) -> list[int]:
    return [1] + [count for count in (2, 4, 8, 16, 32, _MOST_PARTS) if steps // count >= STEPS_PER_PART]


def _column_walk(
    kept: int, steps: int, chunks: int, column_threads: int, threads: int, wanted: int, value_bytes: int
) -> ColumnWalk:
    part = max(1, ceildiv(steps, wanted))
    row_threads = max(1, min(threads // column_threads, part))
    kept_threads = max(1, min(threads // (column_threads * row_threads), kept))
    column_tiles = ceildiv(chunks, column_threads)
    tiles = ceildiv(kept, kept_threads) * column_tiles
    parts = Parts(max(1, ceildiv(steps, part)), part)
    batch = batch_of(ceildiv(part, row_threads), value_bytes)
    return ColumnWalk(threads, kept_threads, row_threads, column_threads, column_tiles, tiles, parts, batch)


def column_walk_cycles(walk: ColumnWalk, vector_bytes: int, multiprocessors: int) -> float:
    """Estimated cycles, without those that every launch takes. Of means over 7×7 pixels of 1,280 channels in fp16 it
    says, with 2 µs for the launch, 15.5 µs for 15.0 measured on an H100 (batch 128, in blocks of 512) and 4.4 for 4.0
    (batch 32, in blocks of 256)."""
    blocks = walk.tiles * walk.parts.count
    busy = walk.kept_threads * walk.row_threads * walk.column_threads
    batches = ceildiv(ceildiv(walk.parts.size, walk.row_threads), walk.batch)
    block_bytes = walk.parts.size * walk.kept_threads * walk.column_threads * vector_bytes
    issued = walk.threads / 32 * (batches * walk.batch * _OF_A_LOAD + _INSTRUCTIONS) / _ISSUED
    work = max(issued, block_bytes / _BLOCK_RATE)
    wait = batches * _WAIT + _ROUND * power_of_two(walk.row_threads).bit_length()
    resident = max(1, _ALL_REGISTERS // (_REGISTERS + _PER_LOAD * walk.batch) // walk.threads)
    # Blocks of the busiest multiprocessor: those that are resident work while others wait.
    own = ceildiv(blocks, multiprocessors)
    wave = max(own * work, ceildiv(own, resident) * (wait + work))
    total = blocks * block_bytes / _TOTAL_RATE
    if walk.column_tiles > 1:  # memory turns to another place for every run of vectors: as long as 32 bytes more take
        total *= 1 + 32 / (walk.column_threads * vector_bytes)
    # Threads without work hide less of the others' waiting.
    return hypot(wave, total) + 0.1 * total * walk.threads / busy + (_JOIN if walk.parts.count > 1 else 0)
