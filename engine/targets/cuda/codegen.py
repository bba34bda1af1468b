"""Expressions of the IR as CUDA C++: the prologue and epilogue functors that every kernel takes.

A functor computes WIDTH neighbouring columns of one row of the kernel's iteration space: `Epilogue::store(p, row,
column, count, acc, Epilogue::fetch(p, row, column, count))` writes every output of the node, `Prologue::load(p, row,
column, count, value)` reads its source. A kernel may fetch what an epilogue reads long before it stores, and find a
row (`at`, `to`) once for many columns: what tables name is looked up there. What is the same in every row (`fixed`, a
bias) can be fetched apart from what is not (`varying`, a residual), and serve many rows. Floats are
computed in fp32 (fp64 where the expression says so) and rounded once, when stored. Adding an operation to the IR adds a
line to `_FLOAT` or `_INTEGER`, and a device function to kernels/epilogue/math.cuh where the language lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.targets.cuda.gelu import gelu_of, silu_of
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Argument,
    Functor,
    LevelSizes,
    Reads,
    StatusWord,
    TensorArgument,
    ceildiv,
)
from engine.targets.cuda.spaces import Operand, Space

COMPUTE = {
    DType.F64: "double", DType.F32: "float", DType.F16: "float", DType.BF16: "float", DType.F8E4M3: "float",
    DType.I64: "i64", DType.I32: "i32", DType.I16: "i32", DType.I8: "i32", DType.U64: "u64", DType.U32: "u32",
    DType.U16: "i32", DType.U8: "i32", DType.BOOL: "bool",
}  # fmt: skip
"""The types in which elements are computed (`compute_t` of kernels/types.cuh)."""

_SMALL = frozenset({DType.I16, DType.I8, DType.U16, DType.U8})

_FLOAT = {
    PointOp.POW: "powf({}, {})", PointOp.MIN: "min_nan({}, {})", PointOp.MAX: "max_nan({}, {})",
    PointOp.ABS: "fabsf({})", PointOp.MOD: "floor_mod({}, {})", PointOp.FMOD: "trunc_mod({}, {})",
    PointOp.SIGN: "sign({})", PointOp.FLOOR: "floorf({})", PointOp.CEIL: "ceilf({})",
    PointOp.ROUND: "rintf({})", PointOp.SQRT: "sqrtf({})",
    PointOp.EXP: "expf({})", PointOp.LOG: "logf({})", PointOp.SIN: "sinf({})", PointOp.COS: "cosf({})",
    PointOp.TAN: "tanf({})", PointOp.ASIN: "asinf({})", PointOp.ACOS: "acosf({})", PointOp.ATAN: "atanf({})",
    PointOp.SINH: "sinhf({})", PointOp.COSH: "coshf({})", PointOp.ASINH: "asinhf({})", PointOp.ACOSH: "acoshf({})",
    PointOp.ATANH: "atanhf({})", PointOp.TANH: "tanhf({})", PointOp.ERF: "erf_approx({})",
    PointOp.SIGMOID: "sigmoid({})",
}  # fmt: skip
_DOUBLE = {
    **{op: text.replace("f(", "(") for op, text in _FLOAT.items()},
    PointOp.MIN: "min_nan({}, {})", PointOp.MAX: "max_nan({}, {})", PointOp.MOD: "floor_mod({}, {})",
    PointOp.ERF: "erf({})", PointOp.SIGMOID: "(1.0 / (1.0 + exp(-({}))))",
}  # fmt: skip
_INTEGER = {
    PointOp.ADD: "wrap_add({}, {})", PointOp.SUB: "wrap_sub({}, {})", PointOp.MUL: "wrap_mul({}, {})",
    PointOp.NEG: "wrap_sub({1}(0), {0})", PointOp.SHL: "shift_left({}, {})", PointOp.SHR: "shift_right({}, {})",
    PointOp.DIV: "trunc_div({}, {})", PointOp.POW: "integer_power({}, {})", PointOp.MIN: "min_nan({}, {})",
    PointOp.MAX: "max_nan({}, {})", PointOp.MOD: "floor_mod({}, {})", PointOp.FMOD: "trunc_mod({}, {})",
    PointOp.ABS: "({0} < 0 ? wrap_sub({1}(0), {0}) : {0})", PointOp.SIGN: "sign({})",
    PointOp.FLOOR: "({})", PointOp.CEIL: "({})", PointOp.ROUND: "({})",
}  # fmt: skip
_BOOL = {PointOp.MIN: "({} && {})", PointOp.MAX: "({} || {})"}
_ANY = {
    PointOp.ADD: "({} + {})", PointOp.SUB: "({} - {})", PointOp.MUL: "({} * {})", PointOp.DIV: "({} / {})",
    PointOp.NEG: "(-{})",
    PointOp.AND: "({} && {})", PointOp.OR: "({} || {})", PointOp.XOR: "({} != {})",
    PointOp.NOT: "(!{})", PointOp.BITAND: "({} & {})", PointOp.BITOR: "({} | {})", PointOp.BITXOR: "({} ^ {})",
    PointOp.BITNOT: "(~{})", PointOp.EQ: "({} == {})",
    PointOp.LT: "({} < {})", PointOp.LE: "({} <= {})", PointOp.ISNAN: "isnan({})", PointOp.ISINF: "isinf({})",
    PointOp.WHERE: "({} ? {} : {})",
}  # fmt: skip
_LONG = {
    PointOp.EXP: 5, PointOp.LOG: 7, PointOp.SQRT: 8, PointOp.DIV: 9, PointOp.SIGMOID: 8, PointOp.TANH: 18,
    PointOp.ERF: 20, PointOp.POW: 40, PointOp.SIN: 20, PointOp.COS: 20, PointOp.CAST: 0,
}  # fmt: skip
"""About how many instructions a function takes in fp32; what is not here counts as one. `_GELU`: of GELU for results of
16 bits."""
_GELU = 10


def epilogue(
    stores: Sequence[ex.Expr],
    space: Space,
    inputs: Mapping[int, Operand],
    outputs: Sequence[Operand],
    granularity: int,
    acc: DType = DType.F32,
) -> Functor:
    """`Epilogue`: the stores of a node. `inputs` and `outputs` are operands of `space`; `granularity` as in
    `Space.is_aligned`."""
    writer, targets = _Writer("epilogue", space, granularity), list[str]()
    shifting, rest, carried, values = list[str](), list[str](), list[str](), list[ex.Expr]()
    writer.read(inputs)
    for j, output in enumerate(outputs):
        writer.declare(f"epilogue_out{j}", output)
        writer.prepare.append(f"{COMPUTE[output.dtype]} out{j}[WIDTH];")
        targets.append(f"targets.out{j} = row_offset(p.epilogue_out{j}, r);")
        place = f"(p.epilogue_out{j}, targets.out{j}, column, count, out{j});"
        bounds = bounds_of(stores[j]) if writer.stores_packs(output) else None
        if bounds:
            values.append(bounds.bounded)
            store = f"store_bounded<{STORAGE[output.dtype]}, {bounds.most:#x}>{place}"
        else:
            values.append(stores[j])
            kind = f"{STORAGE[output.dtype]}, {column_kind(output)}, {writer.aligned(output)}"
            store = f"store_columns<{kind}>{place}"
        writer.finish.append(store)
        if writer.shifted(output):
            place = f"p.epilogue_out{j}, targets.out{j}, column, first, end, present"
            function = f"::store_shifted<{STORAGE[output.dtype]}>"
            carried.append(f" Carry out{j};")
            shifting.append(f"{function}({place}, at, out{j}, carries.out{j});")
            rest.append(f"{function}({place}, Along::BEYOND, none, carries.out{j});")
        else:
            shifting.append(f"if (count > 0) {store}")
    results = {
        f"out{j}[i]": (_unrounded(store, output.dtype), output.dtype)
        for j, (store, output) in enumerate(zip(values, outputs, strict=True))
    }
    places = "".join(f" i64 out{j};" for j in range(len(outputs)))
    more = f"u32 column, u32 count, const {COMPUTE[acc]} (&acc)[WIDTH]"
    body = indented([writer.split, "Targets targets;", *targets, "return targets;"])
    head = f"  struct Targets {{{places} }};\n  DEVICE static Targets to(const Params& p, u32 row) {{\n{body}\n  }}\n"
    tail = (
        f"  DEVICE static void store(const Params& p, u32 row, {more}, const Inputs& inputs) "
        "{ store(p, to(p, row), column, count, acc, inputs); }\n"
        f"  DEVICE static void store(const Params& p, u32 row, {more}, const Fixed& fixed, const Varying& varying) "
        "{ store(p, row, column, count, acc, Inputs{fixed, varying}); }\n"
        f"  DEVICE static void store(const Params& p, u32 row, {more}) "
        "{ store(p, row, column, count, acc, fetch(p, row, column, count)); }\n"
    )
    signature = f"void store(const Params& p, const Targets& targets, {more}, const Inputs& inputs)"
    head += f"  struct Carries {{{''.join(carried)} }};\n"
    head += f"  static constexpr bool SHIFTED = {'true' if carried else 'false'};\n"
    head += _rounding(stores, outputs, acc, writer)
    if carried:
        declared = [line.replace("WIDTH", "N") for line in writer.prepare]
        tail += _shifted_stores([*declared, *loop_over(results).lines], shifting, rest, COMPUTE[acc])
    functor = writer.functor("Epilogue", signature, results, head, tail)
    return replace(functor, code=BOUNDED + functor.code) if values != list(stores) else functor


BOUNDED = '#include "epilogue/bounded.cuh"\n'
"""What the code of an epilogue begins with that stores bounded results."""


@dataclass(frozen=True)
class Bounds:
    """What is stored between zero and, unless `most` is 0, the number with these 16 bits: `bounded`, rounded."""

    bounded: ex.Expr
    most: int


def bounds_of(store: ex.Expr) -> Bounds | None:
    """How kernels/epilogue/bounded.cuh stores a result of 16 bits: what ReLU and a clamp from zero to a number of the
    type are the last step of; None of others."""
    if store.dtype not in (DType.F16, DType.BF16) or not isinstance(store, ex.Apply) or store.op is not PointOp.CAST:
        return None
    value, most = store.args[0], 0
    if value.dtype is not DType.F32:
        return None
    upper = _with_constant(value, PointOp.MIN)
    if upper is not None:
        value, bound = upper
        with np.errstate(over="ignore"):  # of a bound that the type has no number for
            rounded = np.float32(bound).astype(store.dtype.numpy)
        if float(rounded) != bound or not 0 < bound < math.inf:
            return None
        most = int(rounded.view(np.uint16))
    lower = _with_constant(value, PointOp.MAX)
    return None if lower is None or lower[1] != 0 else Bounds(ex.cast(lower[0], store.dtype), most)


def _with_constant(value: ex.Expr, op: PointOp) -> tuple[ex.Expr, float] | None:
    """The other operand of an operation with a constant, and that."""
    if not isinstance(value, ex.Apply) or value.op is not op:
        return None
    for x, bound in (value.args, reversed(value.args)):
        if isinstance(bound, ex.Const):
            return x, float(bound.value)
    return None


def _rounding(stores: Sequence[ex.Expr], outputs: Sequence[Operand], acc: DType, writer: _Writer) -> str:
    """`ROUNDS`: the epilogue does no more than round to 16 bits, and where the results go (`place`)."""
    output = outputs[0]
    rounds = list(stores) == [ex.cast(ex.Acc(), output.dtype)] and acc is DType.F32
    if not (rounds and writer.stores_packs(output)):
        return "  static constexpr bool ROUNDS = false;\n"
    storage = STORAGE[output.dtype]
    return (
        f"  static constexpr bool ROUNDS = true;\n  using Rounded = {storage};\n"
        "  DEVICE static Rounded* place(const Params& p, const Targets& targets, u32 column) "
        f"{{ return static_cast<{storage}*>(p.epilogue_out0.data) + targets.out0 + column; }}\n"
    )


def _shifted_stores(values: Sequence[str], stores: Sequence[str], rest: Sequence[str], acc: str) -> str:
    """`store_shifted` and `store_rest` of an epilogue: what kernels/epilogue/access.cuh does for one output, for all of
    them. They are templates, since kernels whose WIDTH is not 8 have no use for them."""
    to, span = (
        "const Targets targets = to(p, row);",
        "const Params& p, u32 row, u32 column, u32 first, u32 end, bool present",
    )
    count = "const u32 count = present && column < end ? min(8u, end - column) : 0;"
    store, last = indented([to, count, *values, *stores]), indented([to, "const float none[N] = {};", *rest])
    return (
        f"  template <int N> DEVICE static void store_shifted({span}, Along at, const {acc} (&acc)[N], "
        f"const Inputs& inputs, Carries& carries) {{\n{store}\n  }}\n"
        f"  template <int N> DEVICE static void store_rest({span}, Carries& carries) {{\n{last}\n  }}\n"
    )


def result(store: ex.Expr) -> Functor:
    """`Result`: what the epilogue stores first, before it is rounded, for a kernel that does more with it."""
    lines = loop_over({"value[i]": (store, store.dtype)}).lines
    signature = "void of(const float (&acc)[WIDTH], const Epilogue::Inputs& inputs, float (&value)[WIDTH])"
    return Functor(f"struct Result {{\n  DEVICE static {signature} {{\n{indented(lines)}\n  }}\n}};\n", (), Reads())


def of_sums(name: str, value: ex.Expr) -> Functor:
    """`name`: a function of a sum alone, in fp32."""
    lines = _expression_lines([value], {ex.Acc(): "acc"})
    body = indented([*lines.lines, f"return {lines.names[value]};"])
    return Functor(f"struct {name} {{\n  DEVICE static float of(float acc) {{\n{body}\n  }}\n}};\n", (), Reads())


def hidden(value: ex.Expr, space: Space, inputs: Mapping[int, Operand], granularity: int) -> Functor:
    """`Hidden`: what a layer makes of its sums that is not stored. Its inputs are the same in every row."""
    writer = _Writer("hidden", space, granularity)
    writer.read(inputs)
    writer.prepare.append("const Inputs inputs = fetch(p, 0, column, count);")
    signature = "void of(const Params& p, u32 column, u32 count, const float (&acc)[WIDTH], float (&value)[WIDTH])"
    return writer.functor("Hidden", signature, {"value[i]": (value, value.dtype)}, "", "")


def prologue(source: ex.Expr, space: Space, inputs: Mapping[int, Operand], granularity: int) -> Functor:
    """`Prologue`: the source of a node, as elements of `value_t`."""
    writer = _Writer("prologue", space, granularity)
    writer.read(inputs)
    value = COMPUTE[source.dtype]
    more = f"u32 column, u32 count, {value} (&value)[WIDTH]"
    writer.prepare.append("const Inputs inputs = fetch(p, rows, column, count);")
    tail = f"  DEVICE static void load(const Params& p, u32 row, {more}) "
    tail += "{ load(p, at(p, row), column, count, value); }\n"
    signature = f"void load(const Params& p, const Rows& rows, {more})"
    results = {"value[i]": (source, source.dtype)}
    return writer.functor("Prologue", signature, results, f"  using value_t = {value};\n", tail)


class _Writer:
    """Collects the parts of one functor: arguments, loads, the loop over columns, stores."""

    def __init__(self, prefix: str, space: Space, granularity: int) -> None:
        self.prefix = prefix
        self.space = space
        self.granularity = granularity
        self.arguments: dict[str, Argument] = {f"{prefix}_levels": LevelSizes(space.levels)}
        self.members: list[str] = []  # of what varies from row to row; `fixed_…`: of what does not
        self.fixed_members: list[str] = []
        self.lookups: list[str] = []
        self.rows: dict[str, str] = {}
        self.fetches: list[str] = []
        self.fixed_fetches: list[str] = []
        self.reads = Reads()
        self.prepare: list[str] = []
        self.finish: list[str] = []

    @property
    def split(self) -> str:
        levels = len(self.space.levels)
        return f"const RowIndex<{levels}> r = split_row<{levels}>(p.{self.prefix}_levels, row);"

    def aligned(self, operand: Operand) -> str:
        return "true" if self.space.is_aligned(operand, self.granularity) else "false"

    def shifted(self, operand: Operand) -> bool:
        """Whether lanes complete each other's 16 bytes of it (`store_shifted` of kernels/epilogue/access.cuh)."""
        return _is_narrow_run(operand) and not self.space.is_aligned(operand, self.granularity)

    def stores_packs(self, operand: Operand) -> bool:
        """Whether all columns of a row of 16-bit floats are stored at once."""
        return _is_narrow_run(operand) and self.space.is_aligned(operand, self.granularity)

    def declare(self, name: str, operand: Operand) -> None:
        self.arguments[name] = TensorArgument(operand.pointer, operand.strides[:-1], operand.strides[-1])

    def read(self, inputs: Mapping[int, Operand]) -> None:
        for i, operand in inputs.items():
            name = f"{self.prefix}_{i}"
            self.declare(name, operand)
            offset = f"row_offset(p.{name}, r)"
            dtype, column = STORAGE[operand.dtype], column_kind(operand)
            columns = 8 if operand.strides[-1] or (operand.index and operand.index.strides[-1]) else 1
            registers = ceildiv(columns * operand.dtype.itemsize, 4)
            fixed = operand.index is None and not any(operand.strides[:-1])
            if not fixed:
                by_row = self.reads.by_row + registers * (columns == 1 and operand.index is None)
                self.reads = replace(self.reads, varying=self.reads.varying + registers, by_row=by_row)
            if operand.index is not None:
                self.declare(f"{name}_index", operand.index)
                self.arguments[f"{name}_rows"] = operand.table_rows
                self.arguments[f"{name}_row_stride"] = I64(operand.table_stride)
                self.arguments[f"{self.prefix}_status"] = StatusWord()
                by = STORAGE[operand.index.dtype]
                place = f"row_offset(p.{name}_index, r)"
                if operand.index.strides[-1]:  # another row in every column
                    self.rows |= {f"a{i}": offset, f"a{i}_index": place}
                    self.members.append(f"Fetched<{dtype}, Column::STRIDED> a{i};")
                    self.fetches.append(
                        f"varying.a{i} = fetch_rows<{dtype}, {by}>(p.{name}, rows.a{i}, p.{name}_index, "
                        f"rows.a{i}_index, p.{name}_rows, p.{name}_row_stride, column, count, p.{self.prefix}_status);"
                    )
                    continue
                self.lookups.append(f"const i64 index{i} = table_index<{by}>(p.{name}_index, {place});")
                row = f"row_within(index{i}, p.{name}_rows, p.{self.prefix}_status)"
                offset += f" + {row} * p.{name}_row_stride"
            member = f"Fetched<{dtype}, {column}> a{i};"
            fetch = f"fetch_columns<{dtype}, {column}, {self.aligned(operand)}>"
            if fixed:
                self.reads = replace(self.reads, fixed=self.reads.fixed + registers)
                self.fixed_members.append(member)
                self.fixed_fetches.append(f"fixed.a{i} = {fetch}(p.{name}, 0, column, count);")
                continue
            self.rows[f"a{i}"] = offset
            self.members.append(member)
            self.fetches.append(f"varying.a{i} = {fetch}(p.{name}, rows.a{i}, column, count);")

    def functor(
        self, name: str, signature: str, results: Mapping[str, tuple[ex.Expr, DType]], head: str, tail: str
    ) -> Functor:
        # All indices are read before the first is compared, which may lead to a store that no load passes.
        found = (f"rows.{place} = {offset};" for place, offset in self.rows.items())
        at = indented([self.split, *self.lookups, "Rows rows;", *found, "return rows;"])
        fetch = indented(["Varying varying;", *self.fetches, "return varying;"])
        fetch_fixed = indented(["Fixed fixed;", *self.fixed_fetches, "return fixed;"])
        head += f"  struct Fixed {{ {' '.join(self.fixed_members)} }};\n"
        head += f"  struct Varying {{ {' '.join(self.members)} }};\n"
        head += "  struct Inputs : Fixed, Varying {};\n"
        head += f"  struct Rows {{ {' '.join(f'i64 {place};' for place in self.rows)} }};\n"
        head += f"  DEVICE static Rows at(const Params& p, u32 row) {{\n{at}\n  }}\n"
        head += (
            f"  DEVICE static Fixed fetch_fixed(const Params& p, u32 column, u32 count) {{\n{fetch_fixed}\n  }}\n"
            "  DEVICE static Varying fetch_varying(const Params& p, const Rows& rows, u32 column, u32 count) "
            f"{{\n{fetch}\n  }}\n"
            "  DEVICE static Varying fetch_varying(const Params& p, u32 row, u32 column, u32 count) "
            "{ return fetch_varying(p, at(p, row), column, count); }\n"
            "  DEVICE static Inputs fetch(const Params& p, const Rows& rows, u32 column, u32 count) "
            "{ return {fetch_fixed(p, column, count), fetch_varying(p, rows, column, count)}; }\n"
            "  DEVICE static Inputs fetch(const Params& p, u32 row, u32 column, u32 count) "
            "{ return fetch(p, at(p, row), column, count); }\n"
        )
        loop = loop_over(results)
        lines = [*self.prepare, *loop.lines, *self.finish]
        code = f"struct {name} {{\n{head}  DEVICE static {signature} {{\n{indented(lines)}\n  }}\n{tail}}};\n"
        return Functor(code, tuple(self.arguments.items()), replace(self.reads, instructions=loop.instructions))


def _is_narrow_run(operand: Operand) -> bool:
    """Whether its columns are neighbouring 16-bit floats."""
    return operand.dtype in (DType.F16, DType.BF16) and operand.strides[-1] == 1


@dataclass(frozen=True)
class Loop:
    """Code that computes results, in about how many instructions an element of each; `word`: what has the last one of
    two columns as it is stored, where that comes so."""

    lines: list[str]
    instructions: int
    word: str = ""


def loop_over(results: Mapping[str, tuple[ex.Expr, DType]], halves: str = "") -> Loop:
    """Computes the results of all columns: what is assigned, and (expression, type) of its value. Where columns are two
    and all results of the 16-bit type `halves`, a GELU that nothing is done to but rounding is computed in these
    (`gelu_of_two` of kernels/epilogue/gelu.cuh), and SiLU of both columns, which share some of the work."""
    roots, lines, given, word = [root for root, _ in results.values()], list[str](), dict[ex.Expr, str](), ""
    instructions = _expression_lines(roots, given).instructions
    narrow = halves and all(root.dtype in (DType.F16, DType.BF16) for root in roots)
    for node in ex.walk(*roots) if narrow else ():
        gelu = gelu_of(node) if node == _before_rounding(roots[-1]) else None
        x, name = gelu.x if gelu else silu_of(node), f"joint{len(given)}"
        if x is None:
            continue
        before = _expression_lines([x], given)
        lines += [f"float {name}[WIDTH];", *_each_column([*before.lines, f"{name}[i] = {before.names[x]};"])]
        if gelu:
            word = f"{name}_word"
            lines.append(f"const u32 {word} = gelu_of_two<{halves}, {', '.join(gelu.words)}>({name});")
        else:
            lines.append(f"silu_all({name});")
        given[node] = f"{name}[i]"
    body = _expression_lines(roots, given)
    ends = (f"{target} = {_stored(body.names[root], root.dtype, to)};" for target, (root, to) in results.items())
    return Loop([*lines, *_each_column([*body.lines, *ends])], instructions, word)


def _each_column(lines: Iterable[str]) -> list[str]:
    return ["#pragma unroll", "for (int i = 0; i < WIDTH; ++i) {", *(f"  {line}" for line in lines), "}"]


def _before_rounding(root: ex.Expr) -> ex.Expr:
    """What a root rounds, where it does that."""
    return root.args[0] if isinstance(root, ex.Apply) and root.op is PointOp.CAST else root


def _stored(text: str, source: DType, target: DType) -> str:
    """A result in the type in which it is computed: what stores it rounds it."""
    return _convert(text, source, DType.F32 if target is DType.F8E4M3 else target)


def _unrounded(root: ex.Expr, stored: DType) -> ex.Expr:
    """What is rounded when it is stored, before that."""
    rounds = isinstance(root, ex.Apply) and root.op is PointOp.CAST and root.dtype is stored is DType.F8E4M3
    return root.args[0] if isinstance(root, ex.Apply) and rounds else root


def indented(lines: Sequence[str]) -> str:
    """The body of a function."""
    return "\n".join(line if line.startswith("#") else f"    {line}" for line in lines)


def column_kind(operand: Operand) -> str:
    """How its columns lie, as kernels/epilogue/access.cuh names it."""
    return "Column::" + {0: "BROADCAST", 1: "UNIT"}.get(operand.strides[-1], "STRIDED")


class _Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[ex.Expr, str] = {}
        self.instructions = 0


def _expression_lines(roots: Sequence[ex.Expr], given: Mapping[ex.Expr, str]) -> _Lines:
    """One statement per operation, shared sub-expressions once, none for what is `given` by name. Where all results
    have 16 bits, GELU is computed as well as these need."""
    result = _Lines()
    result.names |= given
    narrow = all(root.dtype in (DType.F16, DType.BF16) for root in roots)
    gelus = {node: gelu.x for node in ex.walk(*roots) if (gelu := gelu_of(node)) and gelu.with_erf} if narrow else {}
    used, pending = set[ex.Expr](), list(roots)
    while pending:
        node = pending.pop()
        if node not in used:
            used.add(node)
            if isinstance(node, ex.Apply) and node not in given:
                pending += [gelus[node]] if node in gelus else node.args
    for node in ex.walk(*roots):
        if node not in used or node in given:
            continue
        if isinstance(node, ex.Arg):
            result.names[node] = f"inputs.a{node.index}[i]"
        elif isinstance(node, ex.Acc):
            result.names[node] = "acc[i]"
        elif isinstance(node, ex.Const):
            result.names[node] = literal(node.value, node.dtype)
        else:
            name = f"t{len(result.lines)}"
            if node in gelus:
                value = f"gelu_narrow({result.names[gelus[node]]})"
                result.instructions += _GELU
            else:
                value = _apply(node, [result.names[arg] for arg in node.args])
                result.instructions += _LONG.get(node.op, 1)
            result.lines.append(f"const {COMPUTE[node.dtype]} {name} = {value};")
            result.names[node] = name
    return result


def _apply(node: ex.Apply, operands: Sequence[str]) -> str:
    if node.op is PointOp.CAST:
        return _convert(operands[0], node.args[0].dtype, node.dtype)
    args = [arg.dtype for arg in node.args]
    if node.op is PointOp.WHERE:
        common = node.dtype
        typed = [
            operands[0],
            *(_convert(text, dtype, common) for text, dtype in zip(operands[1:], args[1:], strict=True)),
        ]
    elif node.op in ex.COMPARISONS:
        common = next((dtype for dtype in args if dtype.is_float), args[0])
        typed = [_convert(text, dtype, common) for text, dtype in zip(operands, args, strict=True)]
    else:
        common = node.dtype
        typed = [_convert(text, dtype, common) for text, dtype in zip(operands, args, strict=True)]
    if node.op is PointOp.POW and common.is_float and isinstance(node.args[1], ex.Const):
        special = _power(typed[0], float(node.args[1].value))
        if special is not None:
            return special
    table = {"double": _DOUBLE, "float": _FLOAT, "bool": _BOOL}.get(COMPUTE[common], _INTEGER)
    value = table.get(node.op, _ANY.get(node.op))
    assert value is not None, f"no code for {node.op} on {common}"
    text = value.format(*typed, COMPUTE[common])
    # Narrow integers are computed in 32 bits and wrap when the result is taken.
    return f"static_cast<i32>(static_cast<{STORAGE[node.dtype]}>({text}))" if node.dtype in _SMALL else text


def _power(base: str, exponent: float) -> str | None:
    return {2.0: f"({base} * {base})", 3.0: f"({base} * {base} * {base})", 1.0: f"({base})"}.get(exponent)


def _convert(text: str, source: DType, target: DType) -> str:
    if target is DType.F8E4M3 and source is not target:  # rounded at once: what is quantised is meant to be
        return f"to_float(to_e4m3(static_cast<float>({text})))"
    if COMPUTE[source] == COMPUTE[target] and not (target in _SMALL and source is not target):
        return text
    if target is DType.BOOL:
        return f"({text} != {COMPUTE[source]}(0))"
    if source.is_float and not target.is_float:
        # Through a wider signed integer, so that what does not fit wraps.
        if target is DType.U64:
            return f"({text} < 0 ? static_cast<u64>(static_cast<i64>({text})) : static_cast<u64>({text}))"
        if target in _SMALL or target is DType.U32:
            text = f"static_cast<{'i64' if target is DType.U32 else 'i32'}>({text})"
    narrowed = f"static_cast<{STORAGE[target]}>({text})" if target in _SMALL else text
    return f"static_cast<{COMPUTE[target]}>({narrowed})"


def literal(value: float | int | bool, dtype: DType) -> str:
    """A constant of the compute type of `dtype`."""
    kind = COMPUTE[dtype]
    if kind == "bool":
        return "true" if value else "false"
    if dtype.is_float:
        number = float(value)
        if math.isnan(number):
            return f"static_cast<{kind}>(NAN)"
        if math.isinf(number):
            return f"static_cast<{kind}>({'-' if number < 0 else ''}INFINITY)"
        # Hexadecimal digits are exact; a literal too small for fp32 becomes 0 there as everywhere.
        return f"static_cast<{kind}>({number.hex()})"
    integer = int(value)
    if integer == -(2**63):
        return "(-9223372036854775807ll - 1)"
    suffix = {"u64": "ull", "u32": "u", "i64": "ll"}.get(kind, "")
    return f"static_cast<{kind}>({integer}{suffix})"
