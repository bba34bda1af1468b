"""Arithmetic and mathematical functions, element by element: Add, Pow, Sqrt, Sin, Cast, …"""

from __future__ import annotations

import math
from collections.abc import Callable

from engine.frontend import foreign
from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.registry import operator
from engine.frontend.tensors import dtype_of
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Value

_LAST_ROUNDED = 464.0
"""The largest magnitude that rounds to a number of e4m3."""


def same_dtype(node: OnnxNode, *values: Value) -> None:
    """Raises ModelError unless all operands have one element type, as ONNX demands."""
    dtypes = [value.dtype for value in values]
    if len(set(dtypes)) > 1:
        raise node.invalid(f"operands of different types: {', '.join(dtype.value for dtype in dtypes)}")


def _binary(name: str, op: PointOp) -> None:
    @operator(name)
    def function(node: OnnxNode, a: Value, b: Value) -> Value:
        same_dtype(node, a, b)
        return node.pointwise(lambda x, y: f.apply(op, x, y), a, b)


def _unary(name: str, op: PointOp) -> None:
    @operator(name)
    def function(node: OnnxNode, x: Value) -> Value:
        return node.pointwise(lambda term: f.apply(op, term), x)


def _float_function(name: str, op: PointOp) -> None:
    @operator(name)
    def function(node: OnnxNode, x: Value) -> Value:
        return node.float_pointwise(lambda term: f.apply(op, term), x)


for _name, _op in {
    "Add": PointOp.ADD, "Sub": PointOp.SUB, "Mul": PointOp.MUL, "Div": PointOp.DIV,
    "BitwiseAnd": PointOp.BITAND, "BitwiseOr": PointOp.BITOR, "BitwiseXor": PointOp.BITXOR,
}.items():  # fmt: skip
    _binary(_name, _op)
for _name, _op in {"Neg": PointOp.NEG, "Abs": PointOp.ABS, "Sign": PointOp.SIGN, "BitwiseNot": PointOp.BITNOT}.items():
    _unary(_name, _op)
for _name, _op in {
    "Sqrt": PointOp.SQRT, "Exp": PointOp.EXP, "Log": PointOp.LOG, "Sin": PointOp.SIN, "Cos": PointOp.COS,
    "Tan": PointOp.TAN, "Asin": PointOp.ASIN, "Acos": PointOp.ACOS, "Atan": PointOp.ATAN, "Sinh": PointOp.SINH,
    "Cosh": PointOp.COSH, "Asinh": PointOp.ASINH, "Acosh": PointOp.ACOSH, "Atanh": PointOp.ATANH,
    "Tanh": PointOp.TANH, "Erf": PointOp.ERF, "Sigmoid": PointOp.SIGMOID, "Floor": PointOp.FLOOR,
    "Ceil": PointOp.CEIL, "Round": PointOp.ROUND,
}.items():  # fmt: skip
    _float_function(_name, _op)


@operator("Reciprocal")
def Reciprocal(node: OnnxNode, x: Value) -> Value:
    return node.pointwise(lambda term: 1.0 / term, x)


@operator("Pow")
def Pow(node: OnnxNode, x: Value, exponent: Value) -> Value:
    power = node.known(exponent)
    if power is not None and power.size == 1 and exponent.rank <= x.rank and power.item() in (1, 2, 3):
        factors = int(power.item())
        return node.pointwise(lambda a: a if factors == 1 else a * a if factors == 2 else a * a * a, x)
    wide = DType.F64 if x.dtype.is_int else DType.F32 if x.dtype is not DType.F64 else DType.F64
    if x.dtype.is_int and exponent.dtype.is_int and power is not None and (power >= 0).all():
        wide = x.dtype
    return node.pointwise(lambda a, b: f.apply(PointOp.POW, a.cast(wide), b.cast(wide)).cast(x.dtype), x, exponent)


@operator("Mod")
def Mod(node: OnnxNode, a: Value, b: Value) -> Value:
    same_dtype(node, a, b)
    op = PointOp.FMOD if node.integer("fmod", 0) else PointOp.MOD
    return node.pointwise(lambda x, y: f.apply(op, x, y), a, b)


@operator("BitShift")
def BitShift(node: OnnxNode, a: Value, b: Value) -> Value:
    same_dtype(node, a, b)
    op = PointOp.SHL if node.choice("direction", "LEFT", "RIGHT") == "LEFT" else PointOp.SHR
    return node.pointwise(lambda x, y: f.apply(op, x, y), a, b)


def _fold(node: OnnxNode, combine: Callable[[Term, Term], Term], values: tuple[Value, ...]) -> Value:
    if not values:
        raise node.invalid("no inputs")
    same_dtype(node, *values)

    def formula(*terms: Term) -> Term:
        total = terms[0]
        for term in terms[1:]:
            total = combine(total, term)
        return total

    return node.pointwise(formula, *values)


@operator("Sum")
def Sum(node: OnnxNode, *values: Value) -> Value:
    return _fold(node, lambda a, b: a + b, values)


@operator("Mean")
def Mean(node: OnnxNode, *values: Value) -> Value:
    return node.pointwise(lambda total: total / float(len(values)), _fold(node, lambda a, b: a + b, values))


@operator("Min")
def Min(node: OnnxNode, *values: Value) -> Value:
    return _fold(node, f.minimum, values)


@operator("Max")
def Max(node: OnnxNode, *values: Value) -> Value:
    return _fold(node, f.maximum, values)


@operator("Clip", since=11)
def Clip(node: OnnxNode, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    result = x
    if low is not None:
        same_dtype(node, x, low)
        result = node.pointwise(f.maximum, result, low)
    if high is not None:
        same_dtype(node, x, high)
        result = node.pointwise(f.minimum, result, high)
    return result


@operator("Clip")
def Clip_6(node: OnnxNode, x: Value) -> Value:
    low = node.constant(node.number("min"), x.dtype) if node.has("min") else None
    high = node.constant(node.number("max"), x.dtype) if node.has("max") else None
    return Clip(node, x, low, high)


@operator("Cast")
def Cast(node: OnnxNode, x: Value) -> Value:
    dtype = dtype_of(node.integer("to"), node.where)
    if DType.STRING in (dtype, x.dtype) and dtype is not x.dtype:
        return foreign.opaque_value(node, x)
    return cast(node, x, dtype)


def cast(node: OnnxNode, x: Value, dtype: DType) -> Value:
    """`x` in another type. To 8-bit floats, `saturate` says whether what is beyond their range is their largest number
    or NaN."""
    if dtype is not DType.F8E4M3 or x.dtype is dtype:
        return node.cast(x, dtype)
    return node.pointwise(lambda t: to_fp8(node, t), x)


def to_fp8(node: OnnxNode, t: Term) -> Term:
    """`t` rounded to 8-bit floats, which saturates unless the node says otherwise."""
    value = t.cast(DType.F32)
    if not node.integer("saturate", 1):
        # The largest number is the nearest up to the middle between it and what would be the next one.
        value = f.where(f.less_equal(f.absolute(value), _LAST_ROUNDED), value, math.nan)
    return value.cast(DType.F8E4M3)


@operator("CastLike")
def CastLike(node: OnnxNode, x: Value, like: Value) -> Value:
    if DType.STRING in (like.dtype, x.dtype) and like.dtype is not x.dtype:
        return foreign.opaque_value(node, x, like)
    return cast(node, x, like.dtype)


@operator("Identity")
def Identity(_node: OnnxNode, x: Value) -> Value:
    return x


@operator("Dropout")
def Dropout(
    node: OnnxNode, x: Value, ratio: Value | None = None, training_mode: Value | None = None
) -> tuple[Value, Value | None]:
    if training_mode is not None and node.scalar(training_mode, "training_mode"):
        dropped = node.scalar(ratio, "ratio") if ratio is not None else 0.5
        if dropped:
            raise node.unsupported("training mode")
    if len(node.outputs) < 2:
        return x, None
    return x, node.expand(node.constant(True), x.shape)
