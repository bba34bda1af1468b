"""Activation functions, each a formula of one element; and Softmax, which needs its row.

Formulas are computed in fp32 for half-precision tensors.
"""

from __future__ import annotations

import math

import numpy as np

from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, source, store
from engine.frontend.registry import MICROSOFT, operator
from engine.ir import ops
from engine.ir.dim import product
from engine.ir.graph import Value

_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # as in the ONNX specification


def gelu_exact(x: Term) -> Term:
    """x·Φ(x) with the normal distribution's Φ."""
    return x * 0.5 * (f.erf(x * math.sqrt(0.5)) + 1.0)


def gelu_tanh(x: Term) -> Term:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * 0.5 * (f.tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1.0)


@operator("Relu")
def Relu(node: OnnxNode, x: Value) -> Value:
    return node.pointwise(lambda t: f.maximum(t, 0), x)


@operator("LeakyRelu")
def LeakyRelu(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 0.01)
    return node.float_pointwise(lambda t: f.where(f.less(t, 0.0), t * alpha, t), x)


@operator("PRelu")
def PRelu(node: OnnxNode, x: Value, slope: Value) -> Value:
    return node.pointwise(lambda t, s: f.where(f.less(t, 0), t * s, t), x, slope)


@operator("Elu")
def Elu(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 1.0)
    return node.float_pointwise(lambda t: f.where(f.less(t, 0.0), (f.exp(t) - 1.0) * alpha, t), x)


@operator("Selu")
def Selu(node: OnnxNode, x: Value) -> Value:
    alpha, gamma = node.number("alpha", _SELU_ALPHA), node.number("gamma", _SELU_GAMMA)
    return node.float_pointwise(lambda t: f.where(f.less_equal(t, 0.0), (f.exp(t) - 1.0) * alpha, t) * gamma, x)


@operator("Celu")
def Celu(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 1.0)
    return node.float_pointwise(lambda t: f.where(f.less(t, 0.0), (f.exp(t / alpha) - 1.0) * alpha, t), x)


@operator("HardSigmoid")
def HardSigmoid(node: OnnxNode, x: Value) -> Value:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    return node.float_pointwise(lambda t: f.minimum(f.maximum(t * alpha + beta, 0.0), 1.0), x)


@operator("HardSwish")
def HardSwish(node: OnnxNode, x: Value) -> Value:
    return node.float_pointwise(lambda t: t * f.minimum(f.maximum(t * (1 / 6) + 0.5, 0.0), 1.0), x)


@operator("Softplus")
def Softplus(node: OnnxNode, x: Value) -> Value:
    return node.float_pointwise(f.softplus, x)


@operator("Softsign")
def Softsign(node: OnnxNode, x: Value) -> Value:
    return node.float_pointwise(lambda t: t / (f.absolute(t) + 1.0), x)


@operator("ThresholdedRelu")
def ThresholdedRelu(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 1.0)
    return node.float_pointwise(lambda t: f.where(f.less(t.like(alpha), t), t, 0.0), x)


@operator("Shrink")
def Shrink(node: OnnxNode, x: Value) -> Value:
    bias, lambd = node.number("bias", 0.0), node.number("lambd", 0.5)

    def formula(t: Term) -> Term:
        return f.where(f.less(t, -lambd), t + bias, f.where(f.less(t.like(lambd), t), t - bias, 0.0))

    return node.float_pointwise(formula, x)


@operator("Gelu", since=20)
@operator("Gelu", domain=MICROSOFT)
def Gelu(node: OnnxNode, x: Value) -> Value:
    approximate = node.choice("approximate", "none", "tanh") == "tanh"
    return node.float_pointwise(gelu_tanh if approximate else gelu_exact, x)


@operator("Mish")
def Mish(node: OnnxNode, x: Value) -> Value:
    return node.float_pointwise(lambda t: t * f.tanh(f.softplus(t)), x)


@operator("Swish")
def Swish(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 1.0)
    return node.float_pointwise(lambda t: t * f.sigmoid(t if alpha == 1.0 else t * alpha), x)


@operator("Softmax", since=13)
def Softmax(node: OnnxNode, x: Value) -> Value:
    return _softmax(node, x, log=False)


@operator("LogSoftmax", since=13)
def LogSoftmax(node: OnnxNode, x: Value) -> Value:
    return _softmax(node, x, log=True)


@operator("Softmax")
def Softmax_1(node: OnnxNode, x: Value) -> Value:
    return _flat_softmax(node, x, log=False)


@operator("LogSoftmax")
def LogSoftmax_1(node: OnnxNode, x: Value) -> Value:
    return _flat_softmax(node, x, log=True)


def _softmax(node: OnnxNode, x: Value, log: bool) -> Value:
    axis = node.axis(node.integer("axis", -1), x.rank)
    return node.add(ops.Softmax(axis, log, source(x.dtype), store(x.dtype)), x)


def _flat_softmax(node: OnnxNode, x: Value, log: bool) -> Value:
    """Before opset 13 all axes from `axis` on are one row."""
    axis = node.axis(node.integer("axis", 1), x.rank)
    op = ops.Softmax(axis, log, source(x.dtype), store(x.dtype))
    if axis == x.rank - 1 or all(dim == 1 for dim in x.shape[axis + 1 :]):
        return node.add(op, x)
    flat = node.reshape(x, (*x.shape[:axis], product(x.shape[axis:])))
    return node.reshape(node.add(op, flat), x.shape)


@operator("Hardmax", since=13)
def Hardmax(node: OnnxNode, x: Value) -> Value:
    """1 at the first largest element of each row: the smallest position among those that equal the maximum."""
    axis = node.axis(node.integer("axis", -1), x.rank)
    length = x.shape[axis]
    positions = node.add(ops.ShapeTensor((length,), None))
    positions = node.reshape(positions, [length if i == axis else 1 for i in range(x.rank)])
    top = node.add(ops.Reduce(ops.ReduceKind.MAX, (axis,), True, source(x.dtype), store(x.dtype)), x)
    far = int(np.iinfo(np.int64).max)
    candidates = node.pointwise(lambda t, m, p: f.where(f.equal(t, m), p, far), x, top, positions)
    first = ops.Reduce(ops.ReduceKind.MIN, (axis,), True, source(candidates.dtype), store(candidates.dtype))
    return node.pointwise(lambda p, q: f.equal(p, q).cast(x.dtype), positions, node.add(first, candidates))
