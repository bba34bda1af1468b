"""How the kernels of norms and reductions walk over what they reduce, and how they share the walk among threads and
blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
