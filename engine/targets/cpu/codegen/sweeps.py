"""Loops over a space of which some axes are reduced: what norms, softmaxes and reductions are written with.

The axes are, from the outermost: kept ones, reduced ones, and the vector axis, which is either reduced (`Along.ROWS`:
lanes are combined at the end) or kept (`Along.COLUMNS`: each lane is a result of its own, e.g. a channel in a mean over
pixels). `fold` reduces, `sum` does so for floats without losing digits, `each` visits every element once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from engine.targets.cpu.codegen.emit import Int, Value
from engine.targets.cpu.codegen.operands import Access, Cursor, Operand, Row, operand_parameters
from engine.targets.cpu.kernel import KernelBuilder

_RUN = 64  # vectors that are accumulated before the sum moves to the total
_SETS = 4  # accumulators side by side, against the latency of an addition


class Along(Enum):
    """Whether the vector axis is reduced (rows) or kept (columns)."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Space:
    """The compile-time shape of a sweep: how many axes are kept and reduced beside the vector axis; its operands."""

    along: Along
    kept: int
    reduced: int
    operands: tuple[Access, ...]
    writes: int  # how many of the last operands are written

    @property
    def rank(self) -> int:
        return self.kept + self.reduced + 1

    @property
    def written(self) -> range:
        """The operands that are written."""
        return range(len(self.operands) - self.writes, len(self.operands))

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [*(f"size{axis}" for axis in range(self.rank)), "units", "units_per_task", "block", "blocks"]
        for i, access in enumerate(self.operands):
            names += operand_parameters(f"operand{i}", access, self.rank)
        if any(access.index is not None for access in self.operands):
            names.append("status")
        return tuple(names)


Load: TypeAlias = Callable[[int], Value]
Step: TypeAlias = Callable[[Load, list[Value]], list[Value]]
Visit: TypeAlias = Callable[[int, dict[int, Row], Int, Value | None], None]
Combine: TypeAlias = Callable[[list[Value], list[Value]], list[Value]]


class Sweep:
    """The loops of one kernel. `run` calls the body for every unit of work; within it, `fold` and `each` may be used.

    In COLUMNS a unit of work is a block of columns, worked on in groups of `sets` vectors; in ROWS it is a row.
    """

    def __init__(self, kernel: KernelBuilder, space: Space) -> None:
        self.b = kernel
        self.space = space
        self.lanes = kernel.isa.lanes
        self.sizes: list[Int] = [kernel.integer(f"size{axis}") for axis in range(space.rank)]
        self.operands = [
            Operand(kernel, f"operand{i}", a, space.rank, i in space.written) for i, a in enumerate(space.operands)
        ]
        self._cursors: list[Cursor] = []
        self.sets = 1
        self.current = 0  # the set that a step is called for
        self._column: Int = 0
        self._mask: Value | None = None
        self._reads: Sequence[int] = ()

    def run(self, body: Callable[[], None]) -> None:
        """`body` once for each group of results (in COLUMNS its code is written twice: whole groups, and the rest)."""
        b = self.b
        per_task = b.integer("units_per_task")
        first = b.mul(b.task, per_task)
        last = b.smin(b.add(first, per_task), b.integer("units"))
        b.loop(first, last, 1, lambda unit, _: self._unit(unit, body))

    def _unit(self, unit: Value, body: Callable[[], None]) -> None:
        b = self.b
        rest: Int = unit
        column: Int = 0
        if self.space.along is Along.COLUMNS:
            blocks = b.integer("blocks")
            column = b.mul(b.rem(rest, blocks), b.integer("block"))
            rest = b.div(rest, blocks)
        self._cursors = [operand.start for operand in self.operands]
        for axis in reversed(range(self.space.kept)):
            self._cursors = self._moved(self._cursors, axis, b.rem(rest, self.sizes[axis]))
            rest = b.div(rest, self.sizes[axis])
        if self.space.along is Along.ROWS:
            body()
            return
        stop = b.smin(b.add(column, b.integer("block")), self.sizes[-1])
        group = _SETS * self.lanes
        whole = b.add(column, b.mul(b.div(b.sub(stop, column), group), group))

        def columns(first: Value, sets: int) -> None:
            self.sets, self.current, self._column = sets, 0, first
            self._mask = b.tail_mask(self.lanes, b.sub(stop, first)) if sets == 1 else None
            body()

        b.loop(column, whole, group, lambda i, _: columns(i, _SETS))
        b.loop(whole, stop, self.lanes, lambda i, _: columns(i, 1))

    def _moved(self, cursors: list[Cursor], axis: int, count: Int) -> list[Cursor]:
        return [operand.moved(cursor, axis, count) for operand, cursor in zip(self.operands, cursors, strict=True)]

    # --- reduction --------------------------------------------------------------------------------------------------

    def sum(self, reads: Sequence[int], zero: Value, step: Callable[[Load, Value], Value]) -> list[Value]:
        """The sum of floats for each set. `step(load, partial)` adds a vector of elements of the operands `reads`. Runs
        are short, their sums added with compensation (Kahan, "Further remarks on reducing truncation errors", 1965).
        """
        b = self.b

        def plain(a: list[Value], c: list[Value]) -> list[Value]:
            return [b.binary("fadd", x, y) for x, y in zip(a, c, strict=True)]

        def compensated(total: list[Value], part: list[Value]) -> list[Value]:
            change = b.binary("fsub", part[0], total[1])
            after = b.binary("fadd", total[0], change)
            return [after, b.binary("fsub", b.binary("fsub", after, total[0]), change)]

        def one(load: Load, partial: list[Value]) -> list[Value]:
            return [step(load, partial[0]), partial[1]]

        return [total[0] for total in self.fold(reads, [zero, zero], one, plain, compensated)]

    def fold(
        self, reads: Sequence[int], identity: Sequence[Value], step: Step, combine: Combine, join: Combine | None = None
    ) -> list[list[Value]]:
        """Reduce: accumulators start as `identity`, `step(load, accumulators)` adds a vector of the operands
        `reads`, `combine` joins two lots of accumulators (`join` those of a run to the total). Returns those of each
        set; in ROWS of one set, with the result in every lane."""
        join = join or combine
        count = len(identity)
        self._reads = reads
        flat = self._descend(
            0,
            self._cursors,
            list(identity) * self.sets,
            lambda cursors, totals: self._run(cursors, totals, identity, step, combine, join),
        )
        groups = [flat[i * count : (i + 1) * count] for i in range(self.sets)]
        if self.space.along is Along.ROWS:
            groups = [self._across(groups[0], combine)]
        return groups

    def _descend(
        self,
        depth: int,
        cursors: list[Cursor],
        carried: list[Value],
        innermost: Callable[[list[Cursor], list[Value]], list[Value]],
    ) -> list[Value]:
        """Loops over the reduced axes but the innermost one, which is left to `innermost`."""
        inner = self.space.reduced - (self.space.along is Along.COLUMNS)
        if depth >= inner:
            return innermost(cursors, carried)
        axis = self.space.kept + depth
        return self.b.loop(
            0, self.sizes[axis], 1,
            lambda i, values: self._descend(depth + 1, self._moved(cursors, axis, i), values, innermost), carried,
        )  # fmt: skip

    def _run(
        self,
        cursors: list[Cursor],
        totals: list[Value],
        identity: Sequence[Value],
        step: Step,
        combine: Combine,
        join: Combine,
    ) -> list[Value]:
        """The innermost reduced axis, run by run."""
        b = self.b
        if self.space.along is Along.COLUMNS:
            if not self.space.reduced:
                return self._column_step(cursors, 0, totals, step, len(identity))
            size = self.sizes[self.space.kept + self.space.reduced - 1]

            def run(first: Value, values: list[Value]) -> list[Value]:
                last = b.smin(b.add(first, _RUN), size)
                start = list(identity) * self.sets
                part = b.loop(first, last, 1, lambda i, v: self._column_step(cursors, i, v, step, len(identity)), start)
                return self._joined(values, part, len(identity), join)

            return b.loop(0, size, _RUN, run, totals)

        rows = self._rows(cursors)
        size = self.sizes[-1]
        group = _SETS * self.lanes

        def at(i: Int, values: list[Value], mask: Value | None = None) -> list[Value]:
            after = step(lambda j: rows[j].load(i, mask), values)
            if mask is None:
                return after
            return [b.select(mask, new, old) for new, old in zip(after, values, strict=True)]

        def run_of_rows(first: Value, values: list[Value]) -> list[Value]:
            last = b.smin(b.add(first, _RUN * group), size)
            whole = b.add(first, b.mul(b.div(b.sub(last, first), group), group))

            def side_by_side(i: Value, parts: list[Value]) -> list[Value]:
                n = len(identity)
                return [v for s in range(_SETS) for v in at(b.add(i, s * self.lanes), parts[s * n : (s + 1) * n])]

            parts = b.loop(first, whole, group, side_by_side, list(identity) * _SETS)
            lots = [parts[s * len(identity) : (s + 1) * len(identity)] for s in range(_SETS)]
            vectors = b.add(whole, b.mul(b.div(b.sub(last, whole), self.lanes), self.lanes))
            lots[0] = b.loop(whole, vectors, self.lanes, at, lots[0])
            rest = b.sub(last, vectors)
            lots[0] = b.branch(
                b.compare("sgt", rest, 0),
                lambda: at(vectors, lots[0], b.tail_mask(self.lanes, rest)), lambda: lots[0],
            )  # fmt: skip
            part = combine(combine(lots[0], lots[1]), combine(lots[2], lots[3]))
            return join(values, part)

        return b.loop(0, size, _RUN * group, run_of_rows, totals)

    def _column_step(self, cursors: list[Cursor], i: Int, values: list[Value], step: Step, count: int) -> list[Value]:
        if self.space.reduced:
            cursors = self._moved(cursors, self.space.kept + self.space.reduced - 1, i)
        rows = self._rows(cursors)
        after: list[Value] = []
        for s in range(self.sets):
            self.current = s
            place = self.b.add(self._column, s * self.lanes)
            after += step(_loader(rows, place, self._mask), values[s * count : (s + 1) * count])
        return after

    def _rows(self, cursors: list[Cursor]) -> dict[int, Row]:
        return {j: self.operands[j].row(cursors[j], self.lanes) for j in self._reads}

    def _joined(self, a: list[Value], c: list[Value], count: int, combine: Combine) -> list[Value]:
        lots = [slice(s * count, (s + 1) * count) for s in range(self.sets)]
        return [value for lot in lots for value in combine(a[lot], c[lot])]

    def _across(self, values: list[Value], combine: Combine) -> list[Value]:
        """The lanes combined, pairwise, with the result in all of them."""
        distance = self.lanes // 2
        while distance:
            turned = [self.b.shuffle(v, v, [lane ^ distance for lane in range(self.lanes)]) for v in values]
            values = combine(values, turned)
            distance //= 2
        return values

    # --- visits -----------------------------------------------------------------------------------------------------

    def each(self, body: Visit) -> None:
        """`body(set, rows, i, mask)` for every vector of elements: `rows[j].load(i, mask)` reads operand j, `store`
        writes it."""
        b, everything = self.b, range(len(self.operands))

        def innermost(cursors: list[Cursor], _: list[Value]) -> list[Value]:
            if self.space.along is Along.COLUMNS:
                if self.space.reduced:
                    axis = self.space.kept + self.space.reduced - 1
                    b.loop(
                        0, self.sizes[axis], 1,
                        lambda i, _: self._visit(self._moved(cursors, axis, i), body, everything),
                    )  # fmt: skip
                else:
                    self._visit(cursors, body, everything)
                return []
            rows = {j: self.operands[j].row(cursors[j], self.lanes) for j in everything}
            whole = b.mul(b.div(self.sizes[-1], self.lanes), self.lanes)
            b.loop(0, whole, self.lanes, lambda i, _: body(0, rows, i, None))
            rest = b.sub(self.sizes[-1], whole)
            b.branch(b.compare("sgt", rest, 0), lambda: body(0, rows, whole, b.tail_mask(self.lanes, rest)))
            return []

        self._descend(0, self._cursors, [], innermost)

    def once(self, body: Visit, operands: Sequence[int]) -> None:
        """`body(set, rows, i, mask)` once per group of results. Only `operands`, which lie along the kept axes, may be
        used. In ROWS their rows are of scalars."""
        if self.space.along is Along.COLUMNS:
            self._visit(self._cursors, body, operands)
        else:
            body(0, {j: self.operands[j].row(self._cursors[j], 0) for j in operands}, 0, None)

    def _visit(self, cursors: list[Cursor], body: Visit, operands: Sequence[int]) -> None:
        rows = {j: self.operands[j].row(cursors[j], self.lanes) for j in operands}
        for s in range(self.sets):
            body(s, rows, self.b.add(self._column, s * self.lanes), self._mask)


def _loader(rows: dict[int, Row], place: Int, mask: Value | None) -> Load:
    return lambda j: rows[j].load(place, mask)
