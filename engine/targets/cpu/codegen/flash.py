"""The attention kernel: a block of queries against all keys. Launched by `attention.py`; `packed.py` makes of the same
blocks the kernel for packed sequences.

The lanes of a vector are queries. Scores are computed transposed, Sᵀ = K·(scale·Q)ᵀ, and so is the result, Oᵀ = Vᵀ·Pᵀ:
the softmax over keys is then a lane-wise running maximum and sum, and keys and values are read as scalars straight from
where they lie; only the queries of the block are transposed, once. A task is one block of queries of one head. Scratch
holds Qᵀ, the scores of KEY_BLOCK keys, Oᵀ and the rows of the answer: it does not grow with the sequence.
(Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.targets.cpu.codegen.emit import Int, Value, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.operands import (
    Access,
    Cursor,
    Operand,
    Walk,
    load_gathered,
    operand_parameters,
    spread,
    transpose,
)
from engine.targets.cpu.codegen.vector_math import softmax_exp
from engine.targets.cpu.kernel import (
    KernelBuilder,
    KernelSpec,
)

KEY_BLOCK = 96  # keys of which the scores are in scratch: with 64 queries 24 KiB, and a multiple of every tile height
_UNROLL = 8
_F32 = 4
OUTPUT_RANK = 4  # batch, head, query, feature


@dataclass(frozen=True)
class AttentionSpec(KernelSpec):
    """`bias` says how the bias lies along the queries: FIXED (one for all), TILED (contiguous along the keys), STRIDED.
    The epilogue's operands lie along batch, head, query and feature."""

    head_dim: int
    value_dim: int
    causal: bool
    masked_rows_zero: bool
    bias: Walk | None
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "attention"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("heads", "queries", "keys", "blocks", "block_count", *self.block_parameters)

    @property
    def block_parameters(self) -> tuple[str, ...]:
        """What a block reads, wherever it lies."""
        names = ["group", "scale"]
        for tensor in "qkv":
            names += [tensor, *(f"{tensor}.{axis}" for axis in ("batch", "head", "row"))]
        if self.bias is not None:
            names += ["bias", *(f"bias.{axis}" for axis in ("batch", "head", "query", "key"))]
        for name, access in self.operands():
            names += operand_parameters(name, access, OUTPUT_RANK)
        return tuple(names)

    def operands(self) -> list[tuple[str, Access]]:
        reads = [(f"read{i}", access) for i, access in enumerate(self.reads)]
        return reads + [(f"write{i}", access) for i, access in enumerate(self.writes)]

    @property
    def max_vectors(self) -> int:
        """Vectors of queries in a full block: with tiles of 6 keys or features they fill the register file."""
        return 4 if self.isa.registers >= 32 else 2

    @property
    def padded_dim(self) -> int:
        """`value_dim` in whole vectors."""
        return -(-self.value_dim // self.isa.lanes) * self.isa.lanes

    @property
    def scratch_bytes(self) -> int:
        rows = self.head_dim + KEY_BLOCK + self.value_dim + 2 + self.padded_dim
        return rows * self.max_vectors * self.isa.lanes * _F32

    def emit(self, kernel: KernelBuilder) -> None:
        b = kernel
        block_count, heads = b.integer("block_count"), b.integer("heads")
        block, rest = b.rem(b.task, block_count), b.div(b.task, block_count)
        entry = b.at(b.pointer("blocks"), block, 16)
        first, vectors = b.load("i64", entry), b.load("i64", b.offset(entry, 8))
        place = Place(b.div(rest, heads), b.rem(rest, heads), 0, first, b.integer("queries"), b.integer("keys"))

        def variant(count: int) -> None:
            if count == 1:
                Block(self, kernel, 1, place).emit()
            else:
                exact = b.compare("eq", vectors, count)
                b.branch(exact, Block(self, kernel, count, place).emit, lambda: variant(count // 2))

        variant(self.max_vectors)


@dataclass(frozen=True)
class Place:
    """Which block of queries is computed, of which sequence."""

    batch: Int
    head: Int
    origin: Int  # where the sequence begins along the axis of queries and keys
    first: Int  # the block's first query, counted from there
    queries: Int
    keys: Int


class Block:
    """Writes the code for blocks of `vectors` vectors of queries."""

    def __init__(self, spec: AttentionSpec, kernel: KernelBuilder, vectors: int, place: Place) -> None:
        self.spec, self.b, self.place = spec, kernel, place
        self.lanes = spec.isa.lanes
        self.vectors = vectors
        self.width = vectors * self.lanes
        self.row = self.width * _F32  # bytes of a row of the transposed matrices
        self.tile = 6 if vectors == spec.max_vectors else 8 if spec.isa.registers >= 32 else 6
        self.type = vector_type("float", self.lanes)
        self.queries, self.keys = place.queries, place.keys

    def _lay_out(self) -> None:
        """The matrices in scratch."""
        b, spec = self.b, self.spec
        self.transposed_q = b.scratch
        self.scores = b.offset(self.transposed_q, spec.head_dim * self.row)
        self.result = b.offset(self.scores, KEY_BLOCK * self.row)
        self.maximum = b.offset(self.result, spec.value_dim * self.row)
        self.sum = b.offset(self.maximum, self.row)
        self.answer = b.offset(self.sum, self.row)

    def emit(self) -> None:
        b, spec = self.b, self.spec
        self._lay_out()
        kv_head = b.div(self.place.head, b.integer("group"))
        self.k_row, self.v_row = b.integer("k.row"), b.integer("v.row")
        self.k, self.v = self._sequence("k", kv_head, self.k_row), self._sequence("v", kv_head, self.v_row)
        if spec.bias is not None:
            self.bias_query, self.bias_key = b.integer("bias.query"), b.integer("bias.key")
            self.bias = b.offset(self._base("bias", self.place.head), b.mul(self.place.first, self.bias_query))
        self._transpose_queries()
        self._start()
        end: Int = self.keys
        if spec.causal:
            end = b.smin(end, b.add(self.place.first, self.width))
        b.loop(0, end, KEY_BLOCK, lambda key, _: self._keys(key, b.smin(KEY_BLOCK, b.sub(end, key))))
        self._finish()

    def emit_zeros(self) -> None:
        """The stores of queries that see no key, over 0."""
        b = self.b
        self._lay_out()
        zero = b.const(0, self.type)
        vectors = self.vectors * self.spec.padded_dim  # in `width` rows, each of `padded_dim` elements
        b.loop(0, vectors, 1, lambda i, _: b.store(zero, b.at(self.answer, i, self.lanes * _F32), _F32))
        self._store_rows()

    def _sequence(self, name: str, head: Int, row: Int) -> Value:
        """Where one head of the block's sequence begins."""
        return self.b.offset(self._base(name, head), self.b.mul(self.place.origin, row))

    def _base(self, name: str, head: Int) -> Value:
        b = self.b
        pointer = b.offset(b.pointer(name), b.mul(self.place.batch, b.integer(f"{name}.batch")))
        return b.offset(pointer, b.mul(head, b.integer(f"{name}.head")))

    def _vector(self, base: Value, row: Int, vector: int) -> Value:
        """Address of a vector in a transposed matrix."""
        return self.b.offset(self.b.offset(base, self.b.mul(row, self.row)), vector * self.lanes * _F32)

    def _load(self, base: Value, row: Int = 0) -> list[Value]:
        return [self.b.load(self.type, self._vector(base, row, v), _F32) for v in range(self.vectors)]

    def _store(self, values: list[Value], base: Value, row: Int = 0) -> None:
        for v, value in enumerate(values):
            self.b.store(value, self._vector(base, row, v), _F32)

    # --- the block's start ------------------------------------------------------------------------------------------

    def _transpose_queries(self) -> None:
        """Qᵀ times the scale. Queries beyond the last repeat the last: their lanes are computed and never stored."""
        b = self.b
        q_row, scale = b.integer("q.row"), b.splat(b.real("scale"), self.lanes)
        q = self._sequence("q", self.place.head, q_row)
        last = b.sub(self.queries, 1)

        def squares(vector: Value) -> None:
            first = b.add(self.place.first, b.mul(vector, self.lanes))
            rows = [b.offset(q, b.mul(b.smin(b.add(first, i), last), q_row)) for i in range(self.lanes)]
            column = b.at(self.transposed_q, vector, self.lanes * _F32)

            def square(feature: Int, count: int) -> None:
                mask = None if count == self.lanes else b.tail_mask(self.lanes, count)
                loaded = [b.load_elements(DType.F32, self.lanes, b.at(row, feature, _F32), mask) for row in rows]
                for i, line in enumerate(transpose(b, loaded)[:count]):
                    b.store(b.binary("fmul", line, scale), b.at(column, b.add(feature, i), self.row), _F32)

            self._by_lanes(self.spec.head_dim, square)

        b.loop(0, self.vectors, 1, lambda vector, _: squares(vector))

    def _by_lanes(self, count: int, body: Callable[[Int, int], None]) -> None:
        """`body(first, how many)` for 0 … count-1 in vectors; the last may be short."""
        whole = count // self.lanes * self.lanes
        if whole:
            self.b.loop(0, whole, self.lanes, lambda i, _: body(i, self.lanes))
        if count - whole:
            body(whole, count - whole)

    def _start(self) -> None:
        b = self.b
        zero = [b.const(0, self.type)] * self.vectors
        self._store([b.const(float("-inf"), self.type)] * self.vectors, self.maximum)
        self._store(zero, self.sum)
        b.loop(0, self.spec.value_dim, 1, lambda i, _: self._store(zero, self.result, i))

    # --- one block of keys ------------------------------------------------------------------------------------------

    def _keys(self, key: Value, count: Int) -> None:
        b = self.b
        if self.spec.bias is Walk.TILED:
            self._transpose_bias(key, count)
        old = self._load(self.maximum)
        new = b.loop(0, count, self.tile, lambda group, best: self._scores(key, group, count, best), old)
        self._store(new, self.maximum)
        # Where every score so far is −∞, subtracting it would give NaN; any finite number gives the weights 0.
        infinite, zero = b.const(float("-inf"), self.type), b.const(0, self.type)
        base = [b.select(b.fcmp("oeq", m, infinite), zero, m) for m in new]
        shrink = [softmax_exp(b, b.binary("fsub", m, n)) for m, n in zip(old, base, strict=True)]
        total = [b.binary("fmul", s, f) for s, f in zip(self._load(self.sum), shrink, strict=True)]

        def weigh(i: Value, sums: list[Value]) -> list[Value]:
            scores = self._load(self.scores, i)
            weights = [softmax_exp(b, b.binary("fsub", s, m)) for s, m in zip(scores, base, strict=True)]
            self._store(weights, self.scores, i)
            return [b.binary("fadd", s, w) for s, w in zip(sums, weights, strict=True)]

        self._store(b.loop(0, count, 1, weigh, total), self.sum)
        values = b.offset(self.v, b.mul(key, self.v_row))
        # Tiles as even as they can be: a small one at the end would wait for its own sums.
        features = self.spec.value_dim
        tiles = -(-features // self.tile)
        small, tall = features // tiles, features % tiles
        for first, stop, height in ((0, tall * (small + 1), small + 1), (tall * (small + 1), features, small)):
            if first < stop:
                b.loop(first, stop, height, partial(self._values, values, height, count, shrink))

    def _scores(self, key: Value, group: Value, count: Int, best: list[Value]) -> list[Value]:
        """Scores of `tile` keys, and the maximum with them. Keys beyond the last repeat it, which changes no maximum;
        their rows in scratch are not read again."""
        b = self.b
        last = b.sub(count, 1)
        rows = [b.smin(b.add(group, i), last) for i in range(self.tile)]
        pointers = [b.offset(self.k, b.mul(b.add(key, row), self.k_row)) for row in rows]

        def feature(d: Int, sums: list[Value]) -> list[Value]:
            queries = self._load(self.transposed_q, d)
            result = []
            for i, pointer in enumerate(pointers):
                element = b.load_splat(DType.F32, self.lanes, b.at(pointer, d, _F32))
                result += [b.fma(element, q, sums[i * self.vectors + v]) for v, q in enumerate(queries)]
            return result

        zeros = [b.const(0, self.type)] * (self.tile * self.vectors)
        flat = self._unrolled(self.spec.head_dim, feature, zeros)
        scores = [flat[i * self.vectors : (i + 1) * self.vectors] for i in range(self.tile)]
        if self.spec.bias is not None:
            biases = [self._bias(b.add(key, row), row) for row in rows]
            scores = [
                [b.binary("fadd", s, o) for s, o in zip(line, bias, strict=True)]
                for line, bias in zip(scores, biases, strict=True)
            ]
        for i, row in enumerate(rows):
            if self.spec.causal:
                scores[i] = self._mask_later(scores[i], b.add(key, row))
            best = [b.maximum(s, m, nan=False) for s, m in zip(scores[i], best, strict=True)]
        for i, line in enumerate(scores):
            self._store(line, self.scores, b.add(group, i))
        return best

    def _unrolled(
        self, count: Int, body: Callable[[Int, list[Value]], list[Value]], carried: list[Value]
    ) -> list[Value]:
        """`body` for 0 … count-1, _UNROLL at a time: the processor foresees the end of a loop of few turns."""
        b = self.b
        whole = b.mul(b.div(count, _UNROLL), _UNROLL)

        def several(first: Value, values: list[Value]) -> list[Value]:
            for i in range(_UNROLL):
                values = body(b.add(first, i), values)
            return values

        carried = b.loop(0, whole, _UNROLL, several, carried)
        if isinstance(count, int):
            for i in range(count // _UNROLL * _UNROLL, count):
                carried = body(i, carried)
            return carried
        return b.loop(whole, count, 1, body, carried)

    def _mask_later(self, scores: list[Value], key: Int) -> list[Value]:
        """−∞ in the lanes of the queries before `key`."""
        b = self.b
        distance = b.i64(b.sub(key, self.place.first))
        narrow = b.splat(b.convert("trunc", distance, "i32"), self.lanes)
        result = []
        for v, score in enumerate(scores):
            numbers = ", ".join(f"i32 {v * self.lanes + lane}" for lane in range(self.lanes))
            earlier = b.compare("slt", Value(f"<{numbers}>", vector_type("i32", self.lanes)), narrow)
            result.append(b.select(earlier, b.const(float("-inf"), self.type), score))
        return result

    def _values(
        self, values: Value, features: int, count: Int, shrink: list[Value], first: Value, _: list[Value]
    ) -> None:
        """Oᵀ of `features` features: shrunk to the new maximum, plus the block's weighted values."""
        b = self.b
        old = [
            b.binary("fmul", o, s)
            for i in range(features)
            for o, s in zip(self._load(self.result, b.add(first, i)), shrink, strict=True)
        ]
        column = b.at(values, first, _F32)

        def key(i: Int, sums: list[Value]) -> list[Value]:
            weights = self._load(self.scores, i)
            pointer = b.offset(column, b.mul(i, self.v_row))
            result = []
            for feature in range(features):
                element = b.load_splat(DType.F32, self.lanes, b.offset(pointer, feature * _F32))
                result += [b.fma(element, w, sums[feature * self.vectors + v]) for v, w in enumerate(weights)]
            return result

        flat = self._unrolled(count, key, old)
        for i in range(features):
            self._store(flat[i * self.vectors : (i + 1) * self.vectors], self.result, b.add(first, i))

    # --- bias -------------------------------------------------------------------------------------------------------

    def _bias(self, key: Int, row: Int) -> list[Value]:
        """The bias of one key for all the block's queries."""
        b = self.b
        if self.spec.bias is Walk.TILED:
            return self._load(self.scores, row)
        pointer = b.offset(self.bias, b.mul(key, self.bias_key))
        if self.spec.bias is Walk.FIXED:
            return [b.load_splat(DType.F32, self.lanes, pointer)] * self.vectors
        result = []
        for v in range(self.vectors):
            count = b.sub(b.sub(self.queries, self.place.first), v * self.lanes)
            start = b.offset(pointer, b.mul(self.bias_query, v * self.lanes))
            mask = b.tail_mask(self.lanes, count)
            result.append(load_gathered(b, DType.F32, spread(b, start, self.bias_query, self.lanes), self.lanes, mask))
        return result

    def _transpose_bias(self, key: Value, count: Int) -> None:
        """The bias of a block of keys, into the rows where its scores will be."""
        b = self.b
        last = b.sub(b.sub(self.queries, self.place.first), 1)
        keys = b.at(self.bias, key, _F32)

        def squares(vector: Value) -> None:
            first = b.mul(vector, self.lanes)
            rows = [b.offset(keys, b.mul(b.smin(b.add(first, i), last), self.bias_query)) for i in range(self.lanes)]
            column = b.at(self.scores, vector, self.lanes * _F32)

            def square(start: Value) -> None:
                mask = b.tail_mask(self.lanes, b.sub(count, start))
                loaded = [b.load_elements(DType.F32, self.lanes, b.at(row, start, _F32), mask) for row in rows]
                for i, line in enumerate(transpose(b, loaded)):
                    b.store(line, b.at(column, b.add(start, i), self.row), _F32)

            b.loop(0, count, self.lanes, lambda start, _: square(start))

        b.loop(0, self.vectors, 1, lambda vector, _: squares(vector))

    # --- the block's end --------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Divide by the sums, transpose back to one row per query, and run the stores on the rows."""
        b, padded = self.b, self.spec.padded_dim
        inverse = []
        for total in self._load(self.sum):
            quotient = b.binary("fdiv", b.const(1, self.type), total)  # ∞ in a fully masked row: 0·∞ is its NaN
            if self.spec.masked_rows_zero:
                empty = b.fcmp("oeq", total, b.const(0, self.type))
                quotient = b.select(empty, b.const(0, self.type), quotient)
            inverse.append(quotient)
        for v, factor in enumerate(inverse):

            def square(feature: Int, count: int, v: int = v, factor: Value = factor) -> None:
                lines = [
                    b.binary("fmul", b.load(self.type, self._vector(self.result, b.add(feature, i), v), _F32), factor)
                    for i in range(count)
                ]
                lines += [b.const(0, self.type)] * (self.lanes - count)
                for i, line in enumerate(transpose(b, lines)):
                    row = b.offset(self.answer, (v * self.lanes + i) * padded * _F32)
                    b.store(line, b.at(row, feature, _F32), _F32)

            self._by_lanes(self.spec.value_dim, square)
        self._store_rows()

    def _store_rows(self) -> None:
        b, spec = self.b, self.spec
        operands = [Operand(b, name, a, OUTPUT_RANK, name.startswith("write")) for name, a in spec.operands()]
        cursors = [operand.start for operand in operands]
        first = b.add(self.place.origin, self.place.first)
        for axis, place in enumerate((self.place.batch, self.place.head, first)):
            cursors = [o.moved(c, axis, place) for o, c in zip(operands, cursors, strict=True)]

        def one(query: Value) -> None:
            at: list[Cursor] = [o.moved(c, 2, query) for o, c in zip(operands, cursors, strict=True)]
            rows = [o.row(c, self.lanes) for o, c in zip(operands, at, strict=True)]
            answer = b.at(self.answer, query, spec.padded_dim * _F32)

            def vector(feature: Int, count: int) -> None:
                mask = None if count == self.lanes else b.tail_mask(self.lanes, count)
                acc = b.load(self.type, b.at(answer, feature, _F32), _F32)
                values = lower_expressions(b, spec.stores, lambda i: rows[i].load(feature, mask), acc, self.lanes)
                for row, value in zip(rows[len(spec.reads) :], values, strict=True):
                    row.store(feature, value, mask)

            self._by_lanes(spec.value_dim, vector)

        present = b.smin(self.width, b.sub(self.queries, self.place.first))
        b.loop(0, present, 1, lambda query, _: one(query))
