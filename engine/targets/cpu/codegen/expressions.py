"""Lowers the expressions of the IR (prologues, epilogues, point-wise chains) to vector instructions.

One entry of `_UNARY`, `_BINARY` or one branch of `_Lowering.apply` per operation; the elementary functions are in
`vector_math.py`. The reference for every operation is `engine.ir.expr.evaluate`. narrow floats are computed in float32
and rounded where they are stored or cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.targets.cpu.codegen.emit import Builder, Value, element_type, scalar_of, vector_type
from engine.targets.cpu.codegen.vector_math import VectorMath, by_lane

_NARROW = frozenset({DType.F16, DType.BF16, DType.F8E4M3})
_FLOAT_BINARY = {
    PointOp.ADD: "fadd",
    PointOp.SUB: "fsub",
    PointOp.MUL: "fmul",
    PointOp.DIV: "fdiv",
    PointOp.FMOD: "frem",
}
_INT_BINARY = {
    PointOp.ADD: "add", PointOp.SUB: "sub", PointOp.MUL: "mul", PointOp.BITAND: "and", PointOp.BITOR: "or",
    PointOp.BITXOR: "xor", PointOp.AND: "and", PointOp.OR: "or", PointOp.XOR: "xor",
}  # fmt: skip
_INTRINSICS = {
    PointOp.ABS: "llvm.fabs", PointOp.FLOOR: "llvm.floor", PointOp.CEIL: "llvm.ceil", PointOp.ROUND: "llvm.rint",
    PointOp.SQRT: "llvm.sqrt",
}  # fmt: skip
_VECTOR_MATH = {
    PointOp.EXP: VectorMath.exp, PointOp.LOG: VectorMath.log, PointOp.SIN: VectorMath.sin, PointOp.COS: VectorMath.cos,
    PointOp.TANH: VectorMath.tanh, PointOp.ERF: VectorMath.erf, PointOp.SIGMOID: VectorMath.sigmoid,
}  # fmt: skip
# Double functions of the C library: for float64, and for what has no vector code.
_LIBRARY = {
    PointOp.EXP: "exp", PointOp.LOG: "log", PointOp.SIN: "sin", PointOp.COS: "cos", PointOp.TANH: "tanh",
    PointOp.ERF: "erf", PointOp.TAN: "tan", PointOp.ASIN: "asin", PointOp.ACOS: "acos", PointOp.ATAN: "atan",
    PointOp.SINH: "sinh", PointOp.COSH: "cosh", PointOp.ASINH: "asinh", PointOp.ACOSH: "acosh", PointOp.ATANH: "atanh",
}  # fmt: skip
_MAX_EXPANDED_POWER = 4  # x⁰ … x⁴ and their inverses are products; beyond, pow() is


def lower(
    builder: Builder,
    roots: Sequence[ex.Expr],
    load_arg: Callable[[int], Value],
    acc: Value | None,
    lanes: int,
) -> list[Value]:
    """The values of `roots` for `lanes` neighbouring elements (0: one element as a scalar).

    `load_arg(i)` gives the register value of `Arg(i)` (called at most once for each i), `acc` that of `Acc`. Register
    types are those of `element_type`. Sub-expressions that are shared are computed once.
    """
    lowering = _Lowering(builder, lanes)
    done: dict[ex.Expr, Value] = {}
    for node in ex.walk(*roots):
        if isinstance(node, ex.Arg):
            done[node] = load_arg(node.index)
        elif isinstance(node, ex.Acc):
            assert acc is not None
            done[node] = acc
        elif isinstance(node, ex.Const):
            done[node] = builder.const(node.value, lowering.type_of(node.dtype))
        else:
            done[node] = lowering.apply(node, [done[arg] for arg in node.args])
    return [done[root] for root in roots]


def working_dtype(dtype: DType) -> DType:
    """The dtype in which elements of `dtype` are computed."""
    return DType.F32 if dtype in _NARROW else dtype


class _Lowering:
    """Lowers one `Apply` at a time, for vectors of `lanes`."""

    def __init__(self, builder: Builder, lanes: int) -> None:
        self.b = builder
        self.lanes = lanes
        self.math = VectorMath(builder, lanes)

    def type_of(self, dtype: DType) -> str:
        return vector_type(element_type(working_dtype(dtype)), self.lanes)

    def apply(self, node: ex.Apply, operands: list[Value]) -> Value:
        source = node.args[-1].dtype if node.args else node.dtype
        if node.op is PointOp.CAST:
            return self._cast(operands[0], source, node.dtype)
        if node.op is PointOp.WHERE:
            return self.b.select(operands[0], operands[1], operands[2])
        if node.op in ex.COMPARISONS:
            return self._compare(node.op, operands, source)
        result = self._float(node, operands) if source.is_float else self._integer(node.op, operands, source)
        if result is None:
            raise UnsupportedOp(
                f"{node.op.value} on {source.value} has no meaning, so the CPU target has no code for it"
            )
        return result

    # --- floats -----------------------------------------------------------------------------------------------------

    def _float(self, node: ex.Apply, operands: list[Value]) -> Value | None:
        b, op, x = self.b, node.op, operands[0]
        if op in _FLOAT_BINARY:
            return b.binary(_FLOAT_BINARY[op], x, operands[1])
        if op in _INTRINSICS:
            return b.intrinsic(_INTRINSICS[op], x.type, x)
        if op is PointOp.MIN:
            return b.minimum(x, operands[1])
        if op is PointOp.MAX:
            return b.maximum(x, operands[1])
        if op is PointOp.NEG:
            return b.emit(f"fneg {x.type} {x.text}", x.type)
        if op is PointOp.SIGN:
            zero = b.const(0, x.type)
            negative = b.select(b.fcmp("olt", x, zero), b.const(-1, x.type), x)  # zero and NaN stay
            return b.select(b.fcmp("ogt", x, zero), b.const(1, x.type), negative)
        if op is PointOp.MOD:
            return self._float_modulo(x, operands[1])
        if op is PointOp.POW:
            return self._power(x, operands[1], node.args[1])
        if op in _VECTOR_MATH and scalar_of(x.type) == "float":
            return _VECTOR_MATH[op](self.math, x)
        if op in _LIBRARY:
            return by_lane(b, _LIBRARY[op], x)
        if op is PointOp.SIGMOID:
            one = b.const(1, x.type)
            power = by_lane(b, "exp", b.binary("fmul", b.intrinsic("llvm.fabs", x.type, x), b.const(-1, x.type)))
            upper = b.binary("fdiv", one, b.binary("fadd", power, one))
            return b.select(b.fcmp("olt", x, b.const(0, x.type)), b.binary("fmul", power, upper), upper)
        return None

    def _float_modulo(self, a: Value, divisor: Value) -> Value:
        """fmod with the sign of the divisor."""
        b = self.b
        remainder = b.binary("frem", a, divisor)
        zero = b.const(0, a.type)
        differs = b.binary("xor", b.fcmp("olt", remainder, zero), b.fcmp("olt", divisor, zero))
        differs = b.binary("and", differs, b.fcmp("une", remainder, zero))
        return b.select(differs, b.binary("fadd", remainder, divisor), remainder)

    def _power(self, base: Value, exponent: Value, written: ex.Expr) -> Value:
        b = self.b
        n = written.value if isinstance(written, ex.Const) else None
        if n is not None and n == n and abs(n) <= _MAX_EXPANDED_POWER and n == int(n):
            result = b.const(1, base.type)
            squared = base
            for bit in range(3):
                if abs(int(n)) >> bit & 1:
                    result = squared if result.literal else b.binary("fmul", result, squared)
                squared = b.binary("fmul", squared, squared) if abs(int(n)) >> (bit + 1) else squared
            return b.binary("fdiv", b.const(1, base.type), result) if n < 0 else result
        return by_lane(b, "pow", base, exponent)

    # --- integers and booleans --------------------------------------------------------------------------------------

    def _integer(self, op: PointOp, operands: list[Value], dtype: DType) -> Value | None:
        b, x = self.b, operands[0]
        y = operands[1] if len(operands) > 1 else x
        sign = "s" if dtype.is_signed else "u"
        if op in _INT_BINARY:
            return b.binary(_INT_BINARY[op], x, y)
        if op in (PointOp.NOT, PointOp.BITNOT):
            return b.binary("xor", x, b.const(-1 if dtype is not DType.BOOL else 1, x.type))
        if op in (PointOp.MIN, PointOp.MAX):
            return b.intrinsic(f"llvm.{sign}{op.value}", x.type, x, y)
        if op is PointOp.DIV:
            return self._divide(x, y, dtype)[0]
        if op is PointOp.FMOD:
            return self._divide(x, y, dtype)[1]
        if op is PointOp.MOD:
            return self._modulo(x, y, dtype)
        if op is PointOp.POW:
            return self._integer_power(x, y)
        zero = b.const(0, x.type)
        if op is PointOp.NEG:
            return b.binary("sub", zero, x)
        if op in (PointOp.ABS, PointOp.SIGN):
            negative = b.compare("slt" if dtype.is_signed else "ult", x, zero)
            if op is PointOp.ABS:
                return b.select(negative, b.binary("sub", zero, x), x)
            positive = b.convert("zext", b.compare("ne", x, zero), x.type)
            return b.select(negative, b.const(-1, x.type), positive)
        if op in (PointOp.SHL, PointOp.SHR):
            return self._shift(op, x, y, dtype)
        if op in (PointOp.FLOOR, PointOp.CEIL, PointOp.ROUND):
            return x
        return None

    def _divide(self, a: Value, divisor: Value, dtype: DType) -> tuple[Value, Value]:
        """Quotient (0 by a zero divisor) and remainder (0), with the divisors that trap replaced."""
        b = self.b
        sign = "s" if dtype.is_signed else "u"
        zero, one = b.const(0, a.type), b.const(1, a.type)
        by_zero = b.compare("eq", divisor, zero)
        safe = b.select(by_zero, one, divisor)
        minus = None
        if dtype.is_signed:
            # The smallest number by −1 traps too: divide by 1 and negate, which wraps as NumPy does.
            minus = b.compare("eq", divisor, b.const(-1, a.type))
            safe = b.select(minus, one, safe)
        quotient = b.binary(f"{sign}div", a, safe)
        remainder = b.binary("sub", a, b.binary("mul", quotient, safe))
        if minus is not None:
            quotient = b.select(minus, b.binary("sub", zero, quotient), quotient)
        return b.select(by_zero, zero, quotient), remainder

    def _modulo(self, a: Value, divisor: Value, dtype: DType) -> Value:
        b = self.b
        remainder = self._divide(a, divisor, dtype)[1]
        if not dtype.is_signed:
            return remainder
        zero = b.const(0, a.type)
        differs = b.compare("slt", b.binary("xor", remainder, divisor), zero)
        differs = b.binary("and", differs, b.compare("ne", remainder, zero))
        return b.select(differs, b.binary("add", remainder, divisor), remainder)

    def _integer_power(self, base: Value, exponent: Value) -> Value:
        """By squaring, one turn per bit of the exponent. (Negative exponents have no integer result.)"""
        b = self.b
        bits = int(scalar_of(base.type)[1:])
        zero, one = b.const(0, base.type), b.const(1, base.type)

        def turn(_: Value, values: list[Value]) -> list[Value]:
            result, power, rest = values
            odd = b.compare("ne", b.binary("and", rest, one), zero)
            result = b.select(odd, b.binary("mul", result, power), result)
            return [result, b.binary("mul", power, power), b.binary("lshr", rest, one)]

        return b.loop(0, bits, 1, turn, [one, base, exponent])[0]

    def _shift(self, op: PointOp, x: Value, count: Value, dtype: DType) -> Value:
        """Shifts by the width or more give 0 (or the sign), not whatever the processor does."""
        b = self.b
        bits = int(scalar_of(x.type)[1:])
        large = b.compare("uge", count, b.const(bits, x.type))
        if op is PointOp.SHR and dtype.is_signed:
            return b.binary("ashr", x, b.select(large, b.const(bits - 1, x.type), count))
        safe = b.select(large, b.const(0, x.type), count)
        return b.select(large, b.const(0, x.type), b.binary("shl" if op is PointOp.SHL else "lshr", x, safe))

    # --- comparisons and casts --------------------------------------------------------------------------------------

    def _compare(self, op: PointOp, operands: list[Value], dtype: DType) -> Value:
        b, x = self.b, operands[0]
        if op is PointOp.ISNAN:
            return b.fcmp("uno", x, x)
        if op is PointOp.ISINF:
            return b.fcmp("oeq", b.intrinsic("llvm.fabs", x.type, x), b.const(float("inf"), x.type))
        if dtype.is_float:
            return b.fcmp({PointOp.EQ: "oeq", PointOp.LT: "olt", PointOp.LE: "ole"}[op], x, operands[1])
        order = "s" if dtype.is_signed else "u"
        return b.compare({PointOp.EQ: "eq", PointOp.LT: f"{order}lt", PointOp.LE: f"{order}le"}[op], x, operands[1])

    def _cast(self, x: Value, source: DType, target: DType) -> Value:
        b, type_ = self.b, self.type_of(target)
        if target is DType.BOOL:
            zero = b.const(0, x.type)
            return b.fcmp("une", x, zero) if source.is_float else x if source is target else b.compare("ne", x, zero)
        if source.is_float:
            return self._cast_float(x, target)
        if target.is_float:
            result = b.convert("sitofp" if source.is_signed else "uitofp", x, type_)
            return b.decode(target, b.encode(target, result))
        if target.itemsize > source.itemsize or source is DType.BOOL:
            return b.convert("sext" if source.is_signed else "zext", x, type_)
        return b.convert("trunc", x, type_) if target.itemsize < source.itemsize else x

    def _cast_float(self, x: Value, target: DType) -> Value:
        b, type_ = self.b, self.type_of(target)
        if target is DType.F64:
            return x if x.type == type_ else b.convert("fpext", x, type_)
        if target.is_float:
            value = x if x.type == type_ else b.convert("fptrunc", x, type_)
            return b.decode(target, b.encode(target, value))
        if target is DType.U64:
            # Negative numbers wrap as in C and NumPy; the unsigned conversion alone has no meaning for them.
            signed = b.convert("fptosi", x, type_)
            return b.select(b.fcmp("olt", x, b.const(0, x.type)), signed, b.convert("fptoui", x, type_))
        # Through a wider signed integer, so that what does not fit wraps.
        wide = vector_type("i64" if target in (DType.I64, DType.U32) else "i32", self.lanes)
        value = b.convert("fptosi", x, wide)
        return value if wide == type_ else b.convert("trunc", value, type_)
