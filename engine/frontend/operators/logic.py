"""Comparisons, logical operators and the choice between tensors."""

from __future__ import annotations

from engine.frontend import foreign
from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.elementwise import same_dtype
from engine.frontend.registry import operator
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Value


def _logical(name: str, op: PointOp) -> None:
    @operator(name)
    def function(node: OnnxNode, a: Value, b: Value) -> Value:
        return node.pointwise(lambda x, y: f.apply(op, x, y), node.cast(a, DType.BOOL), node.cast(b, DType.BOOL))


for _name, _op in {"And": PointOp.AND, "Or": PointOp.OR, "Xor": PointOp.XOR}.items():
    _logical(_name, _op)


@operator("Not")
def Not(node: OnnxNode, x: Value) -> Value:
    return node.pointwise(f.logical_not, node.cast(x, DType.BOOL))


@operator("Equal")
def Equal(node: OnnxNode, a: Value, b: Value) -> Value:
    if a.dtype is DType.STRING:
        return foreign.opaque_value(node, a, b)
    same_dtype(node, a, b)
    return node.pointwise(f.equal, a, b)


@operator("Less")
def Less(node: OnnxNode, a: Value, b: Value) -> Value:
    same_dtype(node, a, b)
    return node.pointwise(f.less, a, b)


@operator("LessOrEqual")
def LessOrEqual(node: OnnxNode, a: Value, b: Value) -> Value:
    same_dtype(node, a, b)
    return node.pointwise(f.less_equal, a, b)


@operator("Greater")
def Greater(node: OnnxNode, a: Value, b: Value) -> Value:
    return Less(node, b, a)


@operator("GreaterOrEqual")
def GreaterOrEqual(node: OnnxNode, a: Value, b: Value) -> Value:
    return LessOrEqual(node, b, a)


@operator("IsNaN")
def IsNaN(node: OnnxNode, x: Value) -> Value:
    return node.pointwise(lambda term: f.apply(PointOp.ISNAN, term), x)


@operator("IsInf")
def IsInf(node: OnnxNode, x: Value) -> Value:
    positive, negative = node.integer("detect_positive", 1), node.integer("detect_negative", 1)

    def formula(term: Term) -> Term:
        infinite = f.apply(PointOp.ISINF, term)
        if positive and negative:
            return infinite
        if positive:
            return f.logical_and(infinite, f.less(term.like(0.0), term))
        if negative:
            return f.logical_and(infinite, f.less(term, 0.0))
        return f.logical_and(infinite, f.logical_not(infinite))

    return node.pointwise(formula, x)


@operator("Where")
def Where(node: OnnxNode, condition: Value, a: Value, b: Value) -> Value:
    same_dtype(node, a, b)
    return node.pointwise(f.where, node.cast(condition, DType.BOOL), a, b)
