"""How a kernel reads and writes one tensor along its iteration axes: the device side of `spaces.py`.

A kernel walks iteration axes 0 … rank-1; the last one is the vector axis. Every operand has a pointer and a byte stride
for each axis at run time. How it lies along the vector axis is compile-time (`Walk`). An operand may be a table read
through an index tensor (ONNX Gather): the index has strides of its own, and an index out of range sets the status word
of the step and reads row 0 instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from engine.ir.dtype import DType
from engine.targets.cpu.codegen.emit import Builder, Int, Value, element_type, memory_type, vector_type
from engine.targets.cpu.kernel import KernelBuilder


class Walk(Enum):
    """How an operand moves along the vector axis."""

    FIXED = "fixed"  # stride 0: one element for all
    UNIT = "unit"  # neighbours in memory
    STRIDED = "strided"  # any stride: gathered lane by lane
    TILED = "tiled"  # neighbours along the axis before; read in tiles that are transposed into scratch


@dataclass(frozen=True)
class Access:
    """The compile-time part of an operand. `index` is the dtype of the index tensor of a table, `index_walk` how the
    index moves along the vector axis."""

    dtype: DType
    walk: Walk
    index: DType | None = None
    index_walk: Walk = Walk.FIXED


@dataclass(frozen=True)
class Cursor:
    """A place in an operand: the address of the element and, for a table, that of its index."""

    pointer: Value
    index: Value | None = None


def operand_parameters(name: str, access: Access, rank: int) -> tuple[str, ...]:
    """The argument slots of an operand: addresses and byte strides; of a table also its rows and their stride."""
    slots = [name, *(f"{name}.stride{axis}" for axis in range(rank))]
    if access.index is not None:
        slots += [
            f"{name}.index",
            *(f"{name}.index_stride{axis}" for axis in range(rank)),
            f"{name}.rows",
            f"{name}.row",
        ]
    return tuple(slots)


class Operand:
    """One tensor of a kernel, with its run-time arguments in registers."""

    def __init__(self, kernel: KernelBuilder, name: str, access: Access, rank: int, written: bool = False) -> None:
        self.b: Builder = kernel
        self.access = access
        self.written = written
        self.rank = rank
        self.start = Cursor(kernel.pointer(name))
        self.strides: list[Int] = [kernel.integer(f"{name}.stride{axis}") for axis in range(rank)]
        if access.walk is Walk.UNIT:
            self.strides[-1] = access.dtype.itemsize
        if access.index is not None:
            self.start = replace(self.start, index=kernel.pointer(f"{name}.index"))
            self.index_strides: list[Int] = [kernel.integer(f"{name}.index_stride{axis}") for axis in range(rank)]
            self.rows = kernel.integer(f"{name}.rows")
            self.row_stride = kernel.integer(f"{name}.row")
            self.status = kernel.pointer("status")

    def moved(self, cursor: Cursor, axis: int, count: Int) -> Cursor:
        """`cursor` moved by `count` steps along an axis."""
        pointer = self.b.offset(cursor.pointer, self.b.mul(count, self.strides[axis]))
        if cursor.index is None:
            return Cursor(pointer)
        return Cursor(pointer, self.b.offset(cursor.index, self.b.mul(count, self.index_strides[axis])))

    def row(self, cursor: Cursor, lanes: int) -> Row:
        """The elements along the vector axis from `cursor` on. What is the same for all of them is read here, once."""
        return Row(self, cursor, lanes)

    def checked(self, index: Value, mask: Value | None) -> Value:
        """Indices (i64, scalar or vector), negative ones counted from the end; out of range: 0 and a raised status."""
        b = self.b
        lanes_type = index.type
        is_vector = lanes_type != "i64"
        rows = b.splat(self.rows, _lanes(lanes_type))
        zero = b.const(0, lanes_type)
        index = b.select(
            b.compare("slt", index, zero), b.emit(f"add {lanes_type} {index.text}, {rows.text}", lanes_type), index
        )
        bad = b.compare("uge", index, rows)
        if mask is not None:
            bad = b.binary("and", bad, mask)
        b.branch(b.reduce("or", bad) if is_vector else bad, self._raise)
        return b.select(bad, zero, index)

    def _raise(self) -> None:
        self.b.store(Value("1", "i64"), self.status, 8)


class Row:
    """Reads and writes vectors of an operand along the vector axis."""

    def __init__(self, operand: Operand, cursor: Cursor, lanes: int) -> None:
        self.operand = operand
        self.b = operand.b
        self.lanes = lanes
        self._pointer = cursor.pointer
        self._index = cursor.index
        access = operand.access
        if access.index is not None and access.index_walk is Walk.FIXED:
            assert cursor.index is not None
            index = operand.checked(
                _as_i64(self.b, self.b.load(element_type(access.index), cursor.index), access.index), None
            )
            self._pointer = self.b.offset(self._pointer, self.b.mul(index, operand.row_stride))
            self._index = None
        self._fixed: Value | None = None
        if access.walk is Walk.FIXED and self._index is None and not operand.written:
            self._fixed = self.b.load_splat(access.dtype, lanes, self._pointer)

    def load(self, i: Int, mask: Value | None = None) -> Value:
        """The vector that starts at element `i`; masked lanes are zero and touch no memory."""
        access = self.operand.access
        if self._index is not None:
            return load_gathered(self.b, access.dtype, self._addresses(i, mask), self.lanes, mask)
        if self._fixed is not None:
            return self._fixed
        if access.walk is Walk.UNIT:
            return self.b.load_elements(
                access.dtype, self.lanes, self.b.at(self._pointer, i, access.dtype.itemsize), mask
            )
        return load_gathered(self.b, access.dtype, self._strided(i), self.lanes, mask)

    def store(self, i: Int, value: Value, mask: Value | None = None) -> None:
        """Write the vector that starts at element `i`; masked lanes touch no memory."""
        access = self.operand.access
        if access.walk is Walk.UNIT or not self.lanes:
            self.b.store_elements(access.dtype, value, self.b.at(self._pointer, i, access.dtype.itemsize), mask)
        else:
            store_scattered(self.b, access.dtype, value, self._strided(i), mask)

    def _strided(self, i: Int) -> Value:
        stride = self.operand.strides[-1]
        return spread(self.b, self.b.offset(self._pointer, self.b.mul(i, stride)), stride, self.lanes)

    def _addresses(self, i: Int, mask: Value | None) -> Value:
        """One address per lane of a table whose index varies along the vector axis."""
        b, operand, dtype = self.b, self.operand, self.operand.access.index
        assert dtype is not None
        assert self._index is not None
        stride = operand.index_strides[-1]
        place = b.offset(self._index, b.mul(i, stride))
        if operand.access.index_walk is Walk.UNIT:
            indices = b.load_elements(dtype, self.lanes, place, mask)
        else:
            indices = load_gathered(b, dtype, spread(b, place, stride, self.lanes), self.lanes, mask)
        rows = operand.checked(_as_i64(b, indices, dtype), mask)
        offsets = b.binary("mul", rows, b.splat(b.i64(operand.row_stride), self.lanes))
        return addresses(b, self._pointer, offsets)


def _as_i64(b: Builder, index: Value, dtype: DType) -> Value:
    wide = vector_type("i64", _lanes(index.type))
    return index if index.type == wide else b.convert("sext" if dtype.is_signed else "zext", index, wide)


def _lanes(type_: str) -> int:
    return int(type_[1 : type_.index(" ")]) if type_.startswith("<") else 0


def spread(b: Builder, pointer: Value, stride: Int, lanes: int) -> Value:
    """`lanes` addresses, `stride` bytes apart, from `pointer` on."""
    type_ = vector_type("i64", lanes)
    steps = Value(f"<{', '.join(f'i64 {lane}' for lane in range(lanes))}>", type_)
    return addresses(b, pointer, b.binary("mul", steps, b.splat(b.i64(stride), lanes)))


def addresses(b: Builder, pointer: Value, offsets: Value) -> Value:
    """One address per lane: `pointer` plus a byte offset each."""
    return b.emit(f"getelementptr i8, ptr {pointer.text}, {offsets.type} {offsets.text}",
                  vector_type("ptr", _lanes(offsets.type)))  # fmt: skip


def _all(lanes: int) -> Value:
    return Value("splat (i1 true)", vector_type("i1", lanes))


def load_gathered(b: Builder, dtype: DType, pointers: Value, lanes: int, mask: Value | None) -> Value:
    """One element from each address; masked lanes are zero and touch no memory."""
    type_ = vector_type(memory_type(dtype), lanes)
    value = b.intrinsic("llvm.masked.gather", type_, pointers, Value(str(dtype.itemsize), "i32"), mask or _all(lanes),
                        Value("zeroinitializer", type_), overload=[type_, pointers.type])  # fmt: skip
    return b.decode(dtype, value)


def store_scattered(b: Builder, dtype: DType, value: Value, pointers: Value, mask: Value | None) -> None:
    """One element to each address; masked lanes touch no memory."""
    value = b.encode(dtype, value)
    lanes = _lanes(value.type)
    b.intrinsic("llvm.masked.scatter", "void", value, pointers, Value(str(dtype.itemsize), "i32"), mask or _all(lanes),
                overload=[value.type, pointers.type])  # fmt: skip


def transpose(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """The transpose of a square of lanes, in log₂ steps of pairwise exchanges."""
    lanes = len(rows)
    result = list(rows)
    step = 1
    while step < lanes:
        low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
        high = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
        for i in range(lanes):
            if not i & step:
                a, c = result[i], result[i + step]
                result[i], result[i + step] = b.shuffle(a, c, low), b.shuffle(a, c, high)
        step *= 2
    return result
