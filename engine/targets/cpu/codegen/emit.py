"""A small typed builder of LLVM IR text: what every CPU kernel is written with.

A `Module` collects functions and declarations, a `Builder` appends to one function. Values are SSA names with their
LLVM type. Integers that steer control flow are i64 and may be Python ints, which fold. Control flow is structured:
`loop` carries values from one turn to the next, `branch` joins the values of its two sides. Vector code is written out
at the width of the processor; LLVM only has to inline and to allocate registers, which keeps compilation short.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from engine.ir.dtype import DType
from engine.targets.cpu.codegen.isa import Isa


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value or literal: its text, its LLVM type, and whether it is a literal that is not NaN."""

    text: str
    type: str
    literal: bool = False


Int = Value | int

_ELEMENT = {
    DType.F64: "double", DType.F32: "float", DType.F16: "float", DType.BF16: "float",
    DType.F8E4M3: "float",
    DType.I64: "i64", DType.I32: "i32", DType.I16: "i16", DType.I8: "i8",
    DType.U64: "i64", DType.U32: "i32", DType.U16: "i16", DType.U8: "i8", DType.BOOL: "i1",
}  # fmt: skip
_MEMORY = {DType.F16: "i16", DType.BF16: "i16", DType.F8E4M3: "i8", DType.BOOL: "i8"}
_FLOATS = frozenset({"float", "double"})


def element_type(dtype: DType) -> str:
    """The LLVM type of one element in a register: a bool is an i1, narrow floats are computed in float32."""
    return _ELEMENT[dtype]


def memory_type(dtype: DType) -> str:
    """The LLVM type in which one element is loaded and stored."""
    return _MEMORY.get(dtype) or _ELEMENT[dtype]


def vector_type(element: str, lanes: int) -> str:
    """The vector type, or the scalar type for `lanes` = 0."""
    return f"<{lanes} x {element}>" if lanes else element


@cache
def lanes_of(type_: str) -> int:
    """Lanes of a vector type; 0 for a scalar."""
    return int(type_[1 : type_.index(" ")]) if type_.startswith("<") else 0


@cache
def scalar_of(type_: str) -> str:
    """The element type of a vector type; a scalar type itself."""
    return type_[type_.index("x ") + 2 : -1] if type_.startswith("<") else type_


@cache
def is_float(type_: str) -> bool:
    return scalar_of(type_) in _FLOATS


@cache
def _mangled(type_: str) -> str:
    """The suffix that intrinsics carry for a type: v16f32, i64, p0…"""
    if type_ == "ptr":
        return "p0"
    short = {"float": "f32", "double": "f64"}
    scalar = scalar_of(type_)
    lanes = lanes_of(type_)
    return (f"v{lanes}" if lanes else "") + short.get(scalar, scalar)


@cache
def _literal(value: float | int | bool, type_: str) -> str:
    scalar = scalar_of(type_)
    if scalar in _FLOATS:
        number = float(value)
        if scalar == "float":
            number = struct.unpack("f", struct.pack("f", number))[0] if abs(number) != float("inf") else number
        text = f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
    elif scalar == "i1":
        text = "true" if value else "false"
    else:
        text = str(int(value))
    return f"splat ({scalar} {text})" if lanes_of(type_) else text


class Module:
    """Functions, declarations and constants of one compilation unit for `isa`."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self._functions: list[str] = []
        self._declarations: dict[str, str] = {}
        self._globals: dict[str, str] = {}

    def declare(self, name: str, result: str, parameters: Sequence[str]) -> None:
        """Make an external function known (once)."""
        self._declarations.setdefault(name, f"declare {result} @{name}({', '.join(parameters)})")

    def constant(self, name: str, element: str, values: Sequence[int | float]) -> Value:
        """A constant array; returns a pointer to it."""
        items = ", ".join(f"{element} {_literal(value, element)}" for value in values)
        self._globals.setdefault(
            name, f"@{name} = internal unnamed_addr constant [{len(values)} x {element}] [{items}], align 64"
        )
        return Value(f"@{name}", "ptr")

    def function(
        self,
        name: str,
        parameters: Sequence[tuple[str, str]],
        build: Callable[[Builder, list[Value]], Value | None],
        *,
        result: str = "void",
        inline: bool = False,
        local: bool = False,
    ) -> None:
        """Define a function. `parameters` are (name, LLVM type); `build` writes its body and returns its result.

        `local` makes it private to the module, `inline` also inlined into every caller.
        """
        builder = Builder(self)
        values = [Value(f"%{parameter}", type_.split(" ")[0]) for parameter, type_ in parameters]
        self.define(name, parameters, builder, build(builder, values), result=result, inline=inline, local=local)

    def define(
        self,
        name: str,
        parameters: Sequence[tuple[str, str]],
        builder: Builder,
        returned: Value | None = None,
        *,
        result: str = "void",
        inline: bool = False,
        local: bool = False,
    ) -> None:
        """Define a function whose body `builder` holds."""
        builder.line("ret void" if returned is None else f"ret {returned.type} {returned.text}")
        signature = ", ".join(f"{type_} %{parameter}" for parameter, type_ in parameters)
        width = 8 * self.isa.vector_bytes
        attributes = f'nounwind "min-legal-vector-width"="{width}" "prefer-vector-width"="{width}"'
        linkage, hint = "internal " if inline or local else "", "alwaysinline " if inline else ""
        body = "\n".join(builder.finish())
        self._functions.append(f"define {linkage}{result} @{name}({signature}) {hint}{attributes} {{\n{body}\n}}\n")

    def text(self) -> str:
        return "\n".join([*self._declarations.values(), *self._globals.values(), *self._functions])


class Builder:
    """Appends instructions to one function."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.isa = module.isa
        self._entry: list[str] = ["entry:"]  # stack slots live here, so that a loop does not make them anew
        self._lines: list[str] = []
        self._count = 0
        self._block = "start"

    def finish(self) -> list[str]:
        return [*self._entry, "  br label %start", "start:", *self._lines]

    # --- raw instructions -------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Append an instruction without a result."""
        self._lines.append("  " + text)

    def emit(self, text: str, type_: str) -> Value:
        """Append an instruction; the value it defines has `type_`."""
        self._count += 1
        name = f"%v{self._count}"
        self._lines.append(f"  {name} = {text}")
        return Value(name, type_)

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")
        self._block = name

    def intrinsic(self, name: str, type_: str, *operands: Value, overload: Sequence[str] | None = None) -> Value:
        """Call an LLVM intrinsic that is overloaded on `type_` (or on `overload`)."""
        full = ".".join([name, *(_mangled(t) for t in (overload if overload is not None else [type_]))])
        return self.call(full, type_, *operands)

    def call(self, name: str, type_: str, *operands: Value) -> Value:
        """Call an external function, declared on first use."""
        self.module.declare(name, type_, [operand.type for operand in operands])
        return self.call_local(name, type_, *operands)

    def call_local(self, name: str, type_: str, *operands: Value) -> Value:
        """Call a function of this module."""
        arguments = ", ".join(f"{operand.type} {operand.text}" for operand in operands)
        return self._invoke(f"@{name}", type_, arguments)

    def call_pointer(self, pointer: Value, type_: str, *operands: Value) -> Value:
        """Call through a function pointer."""
        arguments = ", ".join(f"{operand.type} {operand.text}" for operand in operands)
        return self._invoke(pointer.text, type_, arguments)

    def _invoke(self, callee: str, type_: str, arguments: str) -> Value:
        text = f"call {type_} {callee}({arguments})"
        if type_ == "void":
            self.line(text)
            return Value("void", "void")
        return self.emit(text, type_)

    # --- integers and pointers --------------------------------------------------------------------------------------

    def const(self, value: float | int | bool, type_: str) -> Value:
        """A literal; splat over the lanes of a vector type."""
        return Value(_literal(value, type_), type_, value == value)

    def i64(self, value: Int) -> Value:
        """An i64, from a Python int where it is one."""
        return Value(str(value), "i64", True) if isinstance(value, int) else value

    def add(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(b, int) and b == 0:
            return a
        if isinstance(a, int) and a == 0:
            return b
        return self._integer("add nsw", a, b)

    def sub(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if isinstance(b, int) and b == 0 else self._integer("sub nsw", a, b)

    def mul(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        for x, y in ((a, b), (b, a)):
            if isinstance(x, int) and x in (0, 1):
                return y if x else 0
        return self._integer("mul nsw", a, b)

    def div(self, a: Int, b: Int) -> Int:
        """Quotient of non-negative integers."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return a if isinstance(b, int) and b == 1 else self._integer("udiv", a, b)

    def rem(self, a: Int, b: Int) -> Int:
        """Remainder of non-negative integers."""
        if isinstance(a, int) and isinstance(b, int):
            return a % b
        return 0 if isinstance(b, int) and b == 1 else self._integer("urem", a, b)

    def smin(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.intrinsic("llvm.smin", "i64", self.i64(a), self.i64(b))

    def smax(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.intrinsic("llvm.smax", "i64", self.i64(a), self.i64(b))

    def _integer(self, op: str, a: Int, b: Int) -> Value:
        return self.emit(f"{op} i64 {self.i64(a).text}, {self.i64(b).text}", "i64")

    def compare(self, predicate: str, a: Int, b: Int) -> Value:
        """Integer comparison of two i64 (or vectors): eq, ne, slt, sle, sgt, sge, ult…"""
        a, b = self.i64(a), self.i64(b)
        return self.emit(f"icmp {predicate} {a.type} {a.text}, {b.text}", vector_type("i1", lanes_of(a.type)))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return self.emit(f"select {condition.type} {condition.text}, {a.type} {a.text}, {b.type} {b.text}", a.type)

    def offset(self, pointer: Value, nbytes: Int) -> Value:
        """`pointer` moved by a number of bytes (negative ones too)."""
        if isinstance(nbytes, int) and nbytes == 0:
            return pointer
        return self.emit(f"getelementptr i8, ptr {pointer.text}, i64 {self.i64(nbytes).text}", "ptr")

    def at(self, pointer: Value, index: Int, itemsize: int) -> Value:
        """`pointer` moved by `index` elements of `itemsize` bytes."""
        return self.offset(pointer, self.mul(index, itemsize))

    def stack(self, nbytes: int, align: int = 64) -> Value:
        """A piece of the function's stack."""
        self._count += 1
        name = f"%s{self._count}"
        self._entry.append(f"  {name} = alloca [{nbytes} x i8], align {align}")
        return Value(name, "ptr")

    # --- memory -----------------------------------------------------------------------------------------------------

    def load(self, type_: str, pointer: Value, align: int = 1) -> Value:
        return self.emit(f"load {type_}, ptr {pointer.text}, align {align}", type_)

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self.line(f"store {value.type} {value.text}, ptr {pointer.text}, align {align}")

    def load_elements(self, dtype: DType, lanes: int, pointer: Value, mask: Value | None = None) -> Value:
        """`lanes` consecutive elements (0: a scalar) in registers; masked lanes read as zero and touch no memory."""
        type_ = vector_type(memory_type(dtype), lanes)
        if mask is None:
            value = self.load(type_, pointer, dtype.itemsize)
        else:
            value = self.intrinsic(
                "llvm.masked.load", type_, pointer, Value(str(dtype.itemsize), "i32"), mask,
                Value("zeroinitializer", type_), overload=[type_, "ptr"],
            )  # fmt: skip
        return self.decode(dtype, value)

    def store_elements(self, dtype: DType, value: Value, pointer: Value, mask: Value | None = None) -> None:
        """Store register values as elements of `dtype`; masked lanes touch no memory."""
        value = self.encode(dtype, value)
        if mask is None:
            self.store(value, pointer, dtype.itemsize)
            return
        self.intrinsic("llvm.masked.store", "void", value, pointer, Value(str(dtype.itemsize), "i32"), mask,
                       overload=[value.type, "ptr"])  # fmt: skip

    def decode(self, dtype: DType, value: Value) -> Value:
        """What a register holds for elements of `dtype` as they were in memory."""
        if dtype is DType.BOOL:
            return self.compare("ne", value, self.const(0, value.type))
        if dtype is DType.BF16:
            return self.convert("bitcast", self._shifted(self._widened(value), "shl", 16), self._float_of(value))
        if dtype is DType.F8E4M3:
            return self._float_of_e4m3(value)
        if dtype is not DType.F16:
            return value
        if self.isa.fma:
            half = self.convert("bitcast", value, vector_type("half", lanes_of(value.type)))
            return self.convert("fpext", half, self._float_of(value))
        # Without the instruction LLVM would call a function that is not there: shift exponent and mantissa into place.
        bits = self._widened(value)
        magnitude = self._shifted(self._masked(bits, 0x7FFF), "shl", 13)
        scaled = self.convert("bitcast", magnitude, self._float_of(value))
        scaled = self.binary("fmul", scaled, self.const(2.0**112, scaled.type))
        result = self.convert("bitcast", scaled, bits.type)
        special = self.compare("uge", self._masked(bits, 0x7FFF), self.const(0x7C00, bits.type))
        infinite = self.binary("or", magnitude, self.const(0x7F800000, bits.type))
        sign = self._shifted(self._masked(bits, 0x8000), "shl", 16)
        result = self.binary("or", self.select(special, infinite, result), sign)
        return self.convert("bitcast", result, self._float_of(value))

    def encode(self, dtype: DType, value: Value) -> Value:
        """What memory holds for a register value stored as `dtype`; floats are rounded to nearest, ties to even."""
        lanes = lanes_of(value.type)
        stored = vector_type(memory_type(dtype), lanes)
        if dtype is DType.BOOL:
            return self.convert("zext", value, stored)
        if dtype not in (DType.F16, DType.BF16, DType.F8E4M3):
            return value
        if dtype is DType.F16 and self.isa.fma:
            return self.convert("bitcast", self.convert("fptrunc", value, vector_type("half", lanes)), stored)
        bits = self.convert("bitcast", value, vector_type("i32", lanes))
        rounded = {DType.F16: self._half_bits, DType.BF16: self._bfloat_bits, DType.F8E4M3: self._e4m3_bits}
        return self.convert("trunc", rounded[dtype](value, bits), stored)

    def _float_of_e4m3(self, value: Value) -> Value:
        bits = self._widened(value)
        magnitude = self._masked(bits, 0x7F)
        # Exponent and mantissa shifted into place, then rebiased; 0x7F is NaN.
        scaled = self.convert("bitcast", self._shifted(magnitude, "shl", 20), self._float_of(value))
        scaled = self.convert("bitcast", self.binary("fmul", scaled, self.const(2.0**120, scaled.type)), bits.type)
        missing = self.compare("eq", magnitude, self.const(0x7F, bits.type))
        sign = self._shifted(self._masked(bits, 0x80), "shl", 24)
        result = self.binary("or", self.select(missing, self.const(0x7FC00000, bits.type), scaled), sign)
        return self.convert("bitcast", result, self._float_of(value))

    def _e4m3_bits(self, value: Value, bits: Value) -> Value:
        """Numbers beyond the largest, 448, become it."""
        magnitude = self._masked(bits, 0x7FFFFFFF)
        sign = self._masked(self._shifted(bits, "lshr", 24), 0x80)
        # Rebiased by 120 and rounded; below the least normal number steps are 2⁻⁹, as they are in float32 above 2¹⁴.
        rounded = self.binary("add", magnitude, self.const((-120 << 23) + 0x7FFFF, bits.type))
        rounded = self.binary("add", rounded, self._masked(self._shifted(bits, "lshr", 20), 1))
        rounded = self._shifted(rounded, "lshr", 20)
        absolute = self.convert("bitcast", magnitude, value.type)
        aligned = self.convert("bitcast", self.binary("fadd", absolute, self.const(2.0**14, value.type)), bits.type)
        tiny = self.compare("ult", magnitude, self.const(0x3C800000, bits.type))
        rounded = self.select(tiny, self.binary("sub", aligned, self.const(0x46800000, bits.type)), rounded)
        large = self.compare("uge", magnitude, self.const(0x43E00000, bits.type))
        rounded = self.select(large, self.const(0x7E, bits.type), rounded)
        rounded = self.select(self.fcmp("uno", value, value), self.const(0x7F, bits.type), rounded)
        return self.binary("or", rounded, sign)

    def _bfloat_bits(self, value: Value, bits: Value) -> Value:
        rounded = self.binary("add", bits, self.const(0x7FFF, bits.type))
        rounded = self.binary("add", rounded, self._masked(self._shifted(bits, "lshr", 16), 1))
        quiet = self.binary("or", bits, self.const(0x400000, bits.type))
        return self._shifted(self.select(self.fcmp("uno", value, value), quiet, rounded), "lshr", 16)

    def _half_bits(self, value: Value, bits: Value) -> Value:
        magnitude = self._masked(bits, 0x7FFFFFFF)
        sign = self._masked(self._shifted(bits, "lshr", 16), 0x8000)
        # Rebiased by 112 and rounded; a number below the least normal one is aligned by adding ½ instead.
        rounded = self.binary("add", magnitude, self.const((-112 << 23) + 0xFFF, bits.type))
        rounded = self.binary("add", rounded, self._masked(self._shifted(bits, "lshr", 13), 1))
        rounded = self._shifted(rounded, "lshr", 13)
        absolute = self.convert("bitcast", magnitude, value.type)
        aligned = self.convert("bitcast", self.binary("fadd", absolute, self.const(0.5, value.type)), bits.type)
        tiny = self.compare("ult", magnitude, self.const(0x38800000, bits.type))
        rounded = self.select(tiny, self.binary("sub", aligned, self.const(0x3F000000, bits.type)), rounded)
        large = self.compare("uge", magnitude, self.const(0x47800000, bits.type))
        rounded = self.select(large, self.const(0x7C00, bits.type), rounded)
        rounded = self.select(self.fcmp("uno", value, value), self.const(0x7E00, bits.type), rounded)
        return self.binary("or", rounded, sign)

    def _widened(self, value: Value) -> Value:
        return self.convert("zext", value, vector_type("i32", lanes_of(value.type)))

    def _float_of(self, value: Value) -> str:
        return vector_type("float", lanes_of(value.type))

    def _masked(self, value: Value, mask: int) -> Value:
        return self.binary("and", value, self.const(mask, value.type))

    def _shifted(self, value: Value, op: str, count: int) -> Value:
        return self.binary(op, value, self.const(count, value.type))

    def load_splat(self, dtype: DType, lanes: int, pointer: Value) -> Value:
        """One element repeated over the lanes."""
        return self.splat(self.load_elements(dtype, 0, pointer), lanes)

    def tail_mask(self, lanes: int, count: Int) -> Value:
        """A mask with the first `count` lanes set (all for `count` ≥ lanes, none for `count` ≤ 0)."""
        clamped = self.i64(self.smax(self.smin(count, lanes), 0))
        narrow = self.emit(f"trunc i64 {clamped.text} to i32", "i32")
        index = f"<{', '.join(f'i32 {i}' for i in range(lanes))}>"
        return self.emit(f"icmp ult <{lanes} x i32> {index}, {self.splat(narrow, lanes).text}", f"<{lanes} x i1>")

    def atomic_add(self, pointer: Value, value: Int) -> Value:
        """Add to an i64 that other threads use; the value before. A full barrier, as all atomics here."""
        return self.emit(f"atomicrmw add ptr {pointer.text}, i64 {self.i64(value).text} seq_cst", "i64")

    def atomic_load(self, pointer: Value) -> Value:
        return self.emit(f"load atomic i64, ptr {pointer.text} seq_cst, align 8", "i64")

    def atomic_store(self, value: Int, pointer: Value) -> None:
        self.line(f"store atomic i64 {self.i64(value).text}, ptr {pointer.text} seq_cst, align 8")

    def prefetch(self, pointer: Value, locality: int = 3) -> None:
        """Bring a cache line closer; `locality` 3 is the first level, 2 the second."""
        read, data = Value("0", "i32"), Value("1", "i32")
        self.call("llvm.prefetch.p0", "void", pointer, read, Value(str(locality), "i32"), data)

    # --- vectors ----------------------------------------------------------------------------------------------------

    def splat(self, scalar: Value, lanes: int) -> Value:
        if not lanes:
            return scalar
        type_ = vector_type(scalar.type, lanes)
        first = self.emit(f"insertelement {type_} poison, {scalar.type} {scalar.text}, i64 0", type_)
        return self.emit(f"shufflevector {type_} {first.text}, {type_} poison, <{lanes} x i32> zeroinitializer", type_)

    def shuffle(self, a: Value, b: Value, indices: Sequence[int]) -> Value:
        """Lanes picked from the concatenation of `a` and `b`."""
        picks = ", ".join(f"i32 {i}" for i in indices)
        return self.emit(f"shufflevector {a.type} {a.text}, {b.type} {b.text}, <{len(indices)} x i32> <{picks}>",
                         vector_type(scalar_of(a.type), len(indices)))  # fmt: skip

    def extract(self, vector: Value, index: Int) -> Value:
        place = self.i64(index).text
        return self.emit(f"extractelement {vector.type} {vector.text}, i64 {place}", scalar_of(vector.type))

    def binary(self, op: str, a: Value, b: Value) -> Value:
        """A two-operand instruction on equal types: fadd, fmul, add, and, shl…"""
        return self.emit(f"{op} {a.type} {a.text}, {b.text}", a.type)

    def convert(self, op: str, value: Value, type_: str) -> Value:
        """A conversion instruction: fpext, fptosi, sitofp, bitcast, zext, trunc…"""
        return self.emit(f"{op} {value.type} {value.text} to {type_}", type_)

    def fcmp(self, predicate: str, a: Value, b: Value) -> Value:
        return self.emit(f"fcmp {predicate} {a.type} {a.text}, {b.text}", vector_type("i1", lanes_of(a.type)))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once where the processor can, else twice."""
        if self.isa.fma:
            return self.intrinsic("llvm.fma", a.type, a, b, c)
        return self.binary("fadd", self.binary("fmul", a, b), c)

    def maximum(self, a: Value, b: Value, nan: bool = True) -> Value:
        """The larger of two floats. With `nan`, a NaN on either side is the result."""
        return self._extremum("ogt", a, b, nan)

    def minimum(self, a: Value, b: Value, nan: bool = True) -> Value:
        """The smaller of two floats. With `nan`, a NaN on either side is the result."""
        return self._extremum("olt", a, b, nan)

    def _extremum(self, predicate: str, a: Value, b: Value, nan: bool) -> Value:
        # compare-and-select returns its second operand when either is NaN, as the x86 instruction does: one
        # instruction suffices when the first operand is a literal.
        if b.literal:
            a, b = b, a
        result = self.select(self.fcmp(predicate, a, b), a, b)
        if nan and not a.literal:
            result = self.select(self.fcmp("uno", a, a), a, result)
        return result

    def reduce(self, op: str, vector: Value) -> Value:
        """The lanes of a vector combined: "fadd" in any order; "fmax"/"fmin" without regard to NaN; integer "add"…"""
        scalar = scalar_of(vector.type)
        name = f"llvm.vector.reduce.{op}"
        full = f"{name}.{_mangled(vector.type)}"
        if op in ("fadd", "fmul"):
            start = self.const(-0.0 if op == "fadd" else 1.0, scalar)
            self.module.declare(full, scalar, [scalar, vector.type])
            return self.emit(
                f"call reassoc {scalar} @{full}({scalar} {start.text}, {vector.type} {vector.text})", scalar
            )
        self.module.declare(full, scalar, [vector.type])
        flag = "nnan " if op in ("fmax", "fmin") else ""
        return self.emit(f"call {flag}{scalar} @{full}({vector.type} {vector.text})", scalar)

    # --- control flow -----------------------------------------------------------------------------------------------

    def loop(
        self,
        start: Int,
        stop: Int,
        step: Int,
        body: Callable[[Value, list[Value]], Sequence[Value] | None],
        carried: Sequence[Value] = (),
    ) -> list[Value]:
        """``for i in range(start, stop, step)`` for a positive step. `body(i, values)` returns the carried values of
        the next turn; the result is those after the last turn (the initial ones where there is none)."""
        self._count += 1
        head, inside, done = f"head{self._count}", f"body{self._count}", f"done{self._count}"
        index = Value(f"%i{self._count}", "i64")
        names = [Value(f"%c{self._count}.{i}", value.type) for i, value in enumerate(carried)]
        before = self._block
        self.line(f"br label %{head}")
        self._label(head)
        phis = len(self._lines)
        self.line(f"br i1 {self.compare('slt', index, stop).text}, label %{inside}, label %{done}")
        self._label(inside)
        after = list(body(index, names) or ())
        assert [v.type for v in after] == [v.type for v in carried]
        following = self._integer("add nsw", index, step)
        last = self._block
        self.line(f"br label %{head}")
        self._lines[phis:phis] = [
            f"  {index.text} = phi i64 [ {self.i64(start).text}, %{before} ], [ {following.text}, %{last} ]",
            *(
                f"  {name.text} = phi {name.type} [ {first.text}, %{before} ], [ {again.text}, %{last} ]"
                for name, first, again in zip(names, carried, after, strict=True)
            ),
        ]
        self._label(done)
        return names

    def branch(
        self,
        condition: Value,
        then: Callable[[], Sequence[Value] | None],
        otherwise: Callable[[], Sequence[Value] | None] | None = None,
    ) -> list[Value]:
        """If and else. Both sides return values of the same types; the result joins them."""
        self._count += 1
        yes, no, join = f"then{self._count}", f"else{self._count}", f"join{self._count}"
        self.line(f"br i1 {condition.text}, label %{yes}, label %{no}")
        self._label(yes)
        left, left_block = list(then() or ()), self._block
        self.line(f"br label %{join}")
        self._label(no)
        right, right_block = list((otherwise() if otherwise else None) or ()), self._block
        self.line(f"br label %{join}")
        self._label(join)
        return [
            self.emit(f"phi {a.type} [ {a.text}, %{left_block} ], [ {b.text}, %{right_block} ]", a.type)
            for a, b in zip(left, right, strict=True)
        ]

    def repeat(
        self, body: Callable[[list[Value]], tuple[Value, Sequence[Value]]], carried: Sequence[Value] = ()
    ) -> list[Value]:
        """Do-while: `body(values)` returns (go on?, next values); the result is the values after the last turn."""
        self._count += 1
        head, done = f"head{self._count}", f"done{self._count}"
        names = [Value(f"%c{self._count}.{i}", value.type) for i, value in enumerate(carried)]
        before = self._block
        self.line(f"br label %{head}")
        self._label(head)
        phis = len(self._lines)
        again, after = body(names)
        last = self._block
        self.line(f"br i1 {again.text}, label %{head}, label %{done}")
        self._lines[phis:phis] = [
            f"  {name.text} = phi {name.type} [ {first.text}, %{before} ], [ {value.text}, %{last} ]"
            for name, first, value in zip(names, carried, after, strict=True)
        ]
        self._label(done)
        return list(after)
