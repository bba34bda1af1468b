"""The register-tiled matrix product that Gemm and Conv share: sums over segments, then the epilogue.

A tile has up to `tile_rows(isa)` rows and one panel of columns, a few vectors wide, all in registers. The second
operand is packed in panels, ``[panel][depth][width]``. The first is never copied: of every row, and of every *segment*
of the reduction (all of it for a matrix product, one tap or one row of taps for a convolution), a table in scratch says
where it lies. What builds that table makes a matrix product (`gemm.py`) or a convolution (`codegen/taps.py`).

Order of a task: blocks of rows that fit the second-level cache → panels → tiles. The rows of a block are spread evenly
over its tiles, so that 49 rows become 7 tiles of 7 and not 6 of 8 and one of 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.targets.cpu.codegen.emit import Builder, Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.expressions import lower
from engine.targets.cpu.codegen.isa import Isa
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec

# Longer epilogues, and those with elementary functions, loop over the tile, which keeps the machine code small.
_MAX_INLINE_NODES = 8


def tile_rows(isa: Isa, vectors: int) -> int:
    """Rows of a tile `vectors` wide: leaves registers for one row of the panel and one broadcast element."""
    if isa.registers >= 32:
        return 8
    return {1: 6, 2: 6, 3: 4}[vectors]


def tile_vectors(isa: Isa) -> int:
    """Vectors of a full panel."""
    return 3 if isa.registers >= 32 else 2


@dataclass(frozen=True)
class EpilogueArg:
    """An input of the epilogue: whether it moves along the columns (at stride 1) and along the rows of the output."""

    dtype: DType
    columns: bool
    rows: bool


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the accumulator: `stores` over `Acc` and `Arg(i)`, the i-th of `args`."""

    stores: tuple[ex.Expr, ...]
    args: tuple[EpilogueArg, ...]

    @property
    def is_short(self) -> bool:
        """Whether it is worth the machine code to have it once for every register of a tile."""
        nodes = [node for node in ex.walk(*self.stores) if isinstance(node, ex.Apply)]
        return len(nodes) <= _MAX_INLINE_NODES and not any(node.op in ex.UNARY_FLOAT for node in nodes)

    @property
    def tensors(self) -> list[tuple[str, DType, bool, bool]]:
        """(name of its argument slot, dtype, moves along columns, moves along rows) of outputs and inputs."""
        outputs = [(f"out{i}", store.dtype, True, True) for i, store in enumerate(self.stores)]
        return outputs + [(f"arg{i}", arg.dtype, arg.columns, arg.rows) for i, arg in enumerate(self.args)]


@dataclass(frozen=True)
class TileSpec(KernelSpec):
    """`widths` are the lanes of the vectors of a panel; those from number `masked` on may hang over the last column.

    `inner` is the length of a segment where it is short and known, else None. `split` cuts the reduction into blocks of
    segments, with partial sums in scratch. `batched`: every operand has a table of byte offsets, one per batch.
    """

    dtype: DType
    widths: tuple[int, ...]
    masked: int
    inner: int | None
    split: bool
    batched: bool
    epilogue: Epilogue

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def rows(self) -> int:
        return tile_rows(self.isa, len(self.widths))

    @property
    def tensors(self) -> list[str]:
        """The operands, by the name of their slot."""
        return ["a", "b", *(name for name, *_ in self.epilogue.tensors)]

    @property
    def parameters(self) -> tuple[str, ...]:
        return (
            *self.tensors,
            *(f"{name}.batch" for name in self.tensors if self.batched),
            *(f"{name}.row" for name, _, _, rows in self.epilogue.tensors if rows),
            "rows", "chunks", "block_rows", "panels", "groups", "panel_bytes", "segments", "segments_per_block",
            "inner", "columns", "partials", "packed",
            *self.row_parameters,
        )  # fmt: skip

    @property
    @abstractmethod
    def row_parameters(self) -> tuple[str, ...]:
        """The slots that `emit_pointers` and `emit_pack` read."""

    @abstractmethod
    def emit_pointers(self, kernel: KernelBuilder, a: Value, table: Value, row: Int, count: Int, block: Int) -> None:
        """Write the addresses of `count` rows from `row` on to ``table[segment][tile_rows]``. `block` numbers the tile
        in its block of rows."""

    def emit_pack(self, kernel: KernelBuilder, b: Value, first: Int, last: Int) -> Value:
        """Where the panels from `first` to `last` lie packed, as if panel 0 were there too."""
        return b

    def segment_length(self, kernel: KernelBuilder, segment: Int) -> Int:
        """Elements of a segment."""
        return self.inner if self.inner is not None else kernel.integer("inner")

    def emit(self, kernel: KernelBuilder) -> None:
        _Tiles(self, kernel).emit()


class _Tiles:
    """Writes the body of a `TileSpec`."""

    def __init__(self, spec: TileSpec, kernel: KernelBuilder) -> None:
        self.spec = spec
        self.k = kernel
        self.itemsize = spec.dtype.itemsize
        self.row_bytes = spec.width * self.itemsize
        self.starts = [sum(spec.widths[:j]) for j in range(len(spec.widths))]
        self.types = [vector_type(element_type(spec.dtype), width) for width in spec.widths]
        self.bases: dict[str, Value] = {}
        self.tile_memory = kernel.stack(spec.rows * self.row_bytes)

    def emit(self) -> None:
        k, spec = self.k, self.spec
        self._define_finish()
        groups, chunks = k.integer("groups"), k.integer("chunks")
        group, rest = k.rem(k.task, groups), k.div(k.task, groups)
        chunk, batch = k.rem(rest, chunks), k.div(rest, chunks)
        for name in spec.tensors:
            self.bases[name] = k.pointer(name)
            if spec.batched:
                offset = k.load("i64", k.at(k.pointer(f"{name}.batch"), batch, 8), 8)
                self.bases[name] = k.offset(self.bases[name], offset)
        rows, panels, self.block_rows = k.integer("rows"), k.integer("panels"), k.integer("block_rows")
        self.segments, self.panel_bytes = k.integer("segments"), k.integer("panel_bytes")
        first_row, last_row = self._share(rows, chunk, chunks)
        first, last = self._share(panels, group, groups)
        packed = spec.emit_pack(k, self.bases["b"], first, last)
        k.loop(first_row, last_row, self.block_rows, lambda row, _: self._block(row, last_row, first, last, packed))

    def _share(self, total: Int, index: Int, count: Int) -> tuple[Int, Int]:
        """The range of share `index` when `total` things are shared out evenly."""
        k = self.k
        return k.div(k.mul(total, index), count), k.div(k.mul(total, k.add(index, 1)), count)

    def _block(self, row: Value, last_row: Int, first: Int, last: Int, packed: Value) -> None:
        """All panels of one block of rows."""
        k, spec = self.k, self.spec
        rows = k.smin(self.block_rows, k.sub(last_row, row))
        tiles = k.div(k.add(rows, spec.rows - 1), spec.rows)
        height = k.div(rows, tiles)
        higher = k.sub(rows, k.mul(height, tiles))  # so many tiles have one row more
        table_bytes = k.mul(self.segments, spec.rows * 8)

        def tile(i: Value) -> tuple[Int, Int, Value]:
            start = k.add(k.add(row, k.mul(i, height)), k.smin(i, higher))
            more = k.convert("zext", k.compare("slt", i, higher), "i64")
            return start, k.add(height, more), k.offset(k.scratch, k.mul(i, table_bytes))

        def pointers(i: Value, _: list[Value]) -> None:
            start, count, table = tile(i)
            spec.emit_pointers(k, self.bases["a"], table, start, count, i)

        k.loop(0, tiles, 1, pointers)

        def panel(p: Value, _: list[Value]) -> None:
            b = k.offset(packed, k.mul(p, self.panel_bytes))
            masks = self._masks(p)

            def run(first_segment: Int, last_segment: Int) -> None:
                def one(i: Value, _: list[Value]) -> None:
                    start, count, table = tile(i)
                    partials = k.offset(k.scratch, k.add(k.integer("partials"), k.mul(i, spec.rows * self.row_bytes)))
                    job = _Job(start, p, b, table, partials, first_segment, last_segment, masks)
                    self._dispatch(job, count, spec.rows)

                k.loop(0, tiles, 1, one)

            if not spec.split:
                run(0, self.segments)
                return
            step = k.integer("segments_per_block")
            k.loop(0, self.segments, step, lambda s, _: run(s, k.smin(k.add(s, step), self.segments)))

        k.loop(first, last, 1, panel)

    def _masks(self, panel: Int) -> list[Value | None]:
        """The mask of each vector of a panel, None where all lanes are columns."""
        k, spec = self.k, self.spec
        if spec.masked >= len(spec.widths):
            return [None] * len(spec.widths)
        left = k.sub(k.integer("columns"), k.mul(panel, spec.width))
        return [
            k.tail_mask(width, k.sub(left, start)) if j >= spec.masked else None
            for j, (width, start) in enumerate(zip(spec.widths, self.starts, strict=True))
        ]

    def _dispatch(self, job: _Job, count: Int, rows: int) -> None:
        """The tile with as many rows as `count` says."""
        if rows == 1:
            self._tile(job, 1)
            return
        self.k.branch(
            self.k.compare("eq", count, rows),
            partial(self._tile, job, rows),
            partial(self._dispatch, job, count, rows - 1),
        )

    def _tile(self, job: _Job, rows: int) -> None:
        k, spec = self.k, self.spec
        zeros = [Value("zeroinitializer", type_) for _ in range(rows) for type_ in self.types]
        b = job.b
        if spec.split:
            saved = partial(self._load_partials, job, rows)
            zeros = k.branch(k.compare("eq", job.first_segment, 0), lambda: zeros, saved)
            length = spec.inner if spec.inner is not None else k.integer("inner")
            b = k.offset(b, k.mul(k.mul(job.first_segment, self.row_bytes), length))

        def segment(s: Value, carried: list[Value]) -> list[Value]:
            table = k.offset(job.table, k.mul(s, spec.rows * 8))
            rows_at = [k.load("ptr", k.offset(table, 8 * r), 8) for r in range(rows)]
            length = spec.segment_length(k, s)

            def step(i: Int, values: list[Value]) -> list[Value]:
                panel, acc = values[0], values[1:]
                vectors = [
                    k.load(type_, k.offset(panel, start * self.itemsize), self.itemsize)
                    for type_, start in zip(self.types, self.starts, strict=True)
                ]
                result = []
                for r in range(rows):
                    scalar = k.load(element_type(spec.dtype), k.at(rows_at[r], i, self.itemsize), self.itemsize)
                    splats = {width: k.splat(scalar, width) for width in dict.fromkeys(spec.widths)}
                    for j, (vector, width) in enumerate(zip(vectors, spec.widths, strict=True)):
                        result.append(k.fma(splats[width], vector, acc[r * len(vectors) + j]))
                return [k.offset(panel, self.row_bytes), *result]

            if isinstance(length, int):
                for i in range(length):
                    carried = step(i, carried)
                return carried
            return k.loop(0, length, 1, step, carried)

        acc = k.loop(job.first_segment, job.last_segment, 1, segment, [b, *zeros])[1:]
        if not spec.split:
            self._finish(job, rows, acc)
            return
        finished = k.compare("eq", job.last_segment, self.segments)
        k.branch(finished, partial(self._finish, job, rows, acc), lambda: self._save(job.partials, acc))

    def _save(self, place: Value, acc: list[Value]) -> None:
        for i, value in enumerate(acc):
            r, j = divmod(i, len(self.types))
            offset = r * self.row_bytes + self.starts[j] * self.itemsize
            self.k.store(value, self.k.offset(place, offset), self.itemsize)

    def _load_partials(self, job: _Job, rows: int) -> list[Value]:
        return [
            self.k.load(type_, self.k.offset(job.partials, r * self.row_bytes + start * self.itemsize), self.itemsize)
            for r in range(rows)
            for type_, start in zip(self.types, self.starts, strict=True)
        ]

    # The epilogue

    def _finish(self, job: _Job, rows: int, acc: list[Value]) -> None:
        k, spec = self.k, self.spec
        places: dict[str, Value] = {}
        for name, dtype, moves_columns, moves_rows in spec.epilogue.tensors:
            place = self.bases[name]
            if moves_columns:
                place = k.offset(place, k.mul(job.panel, spec.width * dtype.itemsize))
            if moves_rows:
                place = k.offset(place, k.mul(job.row, k.integer(f"{name}.row")))
            places[name] = place
        # Full tiles, and those that an even spread makes next often, keep their values in registers.
        if rows >= spec.rows - 1 and spec.epilogue.is_short:
            fixed: dict[tuple[str, int], Value] = {}
            for r in range(rows):
                values = acc[r * len(self.types) : (r + 1) * len(self.types)]
                self._finish_row(k, places, values, job.masks, fixed)
                places = self._next_row(k, places, k.integer)
            return
        tile = self.tile_memory
        self._save(tile, acc)
        columns = k.sub(k.integer("columns"), k.mul(job.panel, spec.width))
        k.call_local("finish", "void", Value("%args", "ptr"), tile, k.i64(rows), k.i64(columns), *places.values())

    def _define_finish(self) -> None:
        """``finish(args, tile, rows, columns left, places…)``: the epilogue, looping over the rows of a stored tile."""
        spec, tensors = self.spec, self.spec.epilogue.tensors

        def build(b: Builder, values: list[Value]) -> None:
            args, tile, rows, columns, *pointers = values
            parameters = {name: i for i, name in enumerate(spec.parameters)}

            def integer(name: str) -> Value:
                return b.load("i64", b.offset(args, parameters[name] * 8), 8)

            masks = [
                b.tail_mask(width, b.sub(columns, start)) if j >= spec.masked else None
                for j, (width, start) in enumerate(zip(spec.widths, self.starts, strict=True))
            ]
            names = [name for name, *_ in tensors]

            def row(r: Value, carried: list[Value]) -> list[Value]:
                places = dict(zip(names, carried, strict=True))
                source = b.offset(tile, b.mul(r, self.row_bytes))
                acc = [
                    b.load(type_, b.offset(source, start * self.itemsize), self.itemsize)
                    for type_, start in zip(self.types, self.starts, strict=True)
                ]
                self._finish_row(b, places, acc, masks, {})
                return list(self._next_row(b, places, integer).values())

            b.loop(0, rows, 1, row, pointers)

        parameters = [("args", "ptr"), ("tile", "ptr"), ("rows", "i64"), ("columns", "i64")]
        parameters += [(f"place{i}", "ptr") for i in range(len(tensors))]
        self.k.module.function("finish", parameters, build, local=True)

    def _finish_row(
        self,
        b: Builder,
        places: dict[str, Value],
        acc: list[Value],
        masks: list[Value | None],
        fixed: dict[tuple[str, int], Value],
    ) -> None:
        """Epilogue and stores of one row. `fixed` keeps what is the same in every row."""
        spec = self.spec
        for j, (width, start) in enumerate(zip(spec.widths, self.starts, strict=True)):

            def load(index: int, j: int = j, width: int = width, start: int = start) -> Value:
                arg, name = spec.epilogue.args[index], f"arg{index}"
                if (name, j) in fixed:
                    return fixed[name, j]
                if arg.columns:
                    place = b.offset(places[name], start * arg.dtype.itemsize)
                    value = b.load_elements(arg.dtype, width, place, masks[j])
                else:
                    value = b.load_splat(arg.dtype, width, places[name])
                if not arg.rows:
                    fixed[name, j] = value
                return value

            values = lower(b, spec.epilogue.stores, load, acc[j], width)
            for i, (value, store) in enumerate(zip(values, spec.epilogue.stores, strict=True)):
                place = b.offset(places[f"out{i}"], start * store.dtype.itemsize)
                b.store_elements(store.dtype, value, place, masks[j])

    def _next_row(self, b: Builder, places: dict[str, Value], integer: Callable[[str], Value]) -> dict[str, Value]:
        return {
            name: b.offset(places[name], integer(f"{name}.row")) if rows else places[name]
            for name, _, _, rows in self.spec.epilogue.tensors
        }


@dataclass(frozen=True)
class _Job:
    """One tile: where it starts, what it reads, and which part of the reduction it does."""

    row: Int
    panel: Value
    b: Value
    table: Value
    partials: Value
    first_segment: Int
    last_segment: Int
    masks: list[Value | None]
