"""The pass `multiply_quantised`: products of two dequantised tensors become products of what they were made of.

Dequantisation, as DequantizeLinear writes it, is a conversion times a scale. Where the target multiplies the narrow
type itself (`Traits.product_types`) and both operands of a product are dequantised from it, the scales go behind the
sum, into the epilogue: a number for all, or one for every row of the first operand, every column of the second. A scale
that varies along k stays where it is. Views between the two move to the narrow tensor. Others that read the dequantised
tensor keep it. A QuantizeLinear behind the product then becomes its store (`fuse_epilogues`), as any expression does.

It comes before constants are folded: a dequantised weight would be one of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Conv, Gemm, Pointwise, Reshape, Transpose
from engine.passes.editor import Editor
from engine.passes.operands import Operands, stores_of, with_expressions
from engine.passes.traits import Traits
from engine.passes.views import view

Scale: TypeAlias = np.ndarray | Value
"""Constant numbers that broadcast against the tensor, or one computed number."""
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_WHOLE_LINES = 16  # bytes: channels of an image that kernels read as rows of a matrix


@dataclass(frozen=True)
class _Quantised:
    """`views` of `source`, the first one first, times `scale`, which is that of the result."""

    source: Value
    scale: Scale
    views: tuple[Reshape | Transpose, ...] = ()


def multiply_quantised(graph: Graph, traits: Traits) -> None:
    """Rewrite every product whose operands are dequantised from a type that the target multiplies."""
    if not traits.product_types:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Gemm) or (isinstance(node.op, Conv) and _is_matrix_product(node)):
            _rewrite(editor, node, traits)
    editor.finish()


def _is_matrix_product(node: Node) -> bool:
    """Whether a convolution is one of [pixels, channels] and [channels, outputs], all of known size."""
    op, channels, kernel = node.op, node.inputs[1].shape[1], node.inputs[1].shape[2:]
    assert isinstance(op, Conv)
    plain = op.is_pointwise and op.groups == 1 and not op.transposed and all(size == 1 for size in kernel)
    return plain and isinstance(channels, int) and channels % _WHOLE_LINES == 0


def _rewrite(editor: Editor, node: Node, traits: Traits) -> None:
    found = [_dequantised(editor, value) for value in node.inputs[:2]]
    if found[0] is None or found[1] is None:
        return
    a, b = found[0], found[1]
    accumulators = {leaf for leaf in ex.walk(*stores_of(node.op)) if isinstance(leaf, ex.Acc)}
    if a.source.dtype not in traits.product_types or a.source.dtype is not b.source.dtype:
        return
    if accumulators != {ex.Acc(DType.F32)} or any(value in node.inputs[2:] for value in node.inputs[:2]):
        return
    scales = _behind(node, a.scale, b.scale)
    if scales is None:
        return
    operands = Operands([_viewed(editor, one, node) for one in (a, b)])
    scaled: ex.Expr = ex.Acc(DType.F32)
    for scale in scales:
        scaled = ex.apply(ex.PointOp.MUL, scaled, _argument(scale, operands, node))
    stores = tuple(ex.replace_acc(operands.adopt(store, node), scaled) for store in stores_of(node.op))
    before = node.inputs[:2]
    editor.update(node, with_expressions(node.op, stores), operands.inputs)
    editor.prune(before)


def _dequantised(editor: Editor, value: Value) -> _Quantised | None:
    """What `value` was dequantised from, if it was."""
    node = editor.producer(value)
    if node is None:
        return None
    if isinstance(node.op, Reshape | Transpose):
        inner = _dequantised(editor, node.inputs[0])
        scale = None if inner is None else _viewed_scale(inner.scale, node.op)
        if inner is None or scale is None:
            return None
        return replace(inner, scale=scale, views=(*inner.views, node.op))
    if not isinstance(node.op, Pointwise) or node.op.gathers or len(node.op.stores) != 1:
        return None
    store = _unrounded(node.op.stores[0])
    if isinstance(store, ex.Arg) and store.dtype in _FLOATS and node.inputs[store.index].shape == value.shape:
        return _dequantised(editor, node.inputs[store.index])  # made another of the types that models compute in
    factors = _factors(store)
    for one, other in (factors, factors[::-1]):
        place = _converted(one)
        source = None if place is None else node.inputs[place]
        if source is None or source.shape != value.shape:
            continue
        scale = _scale(other, node)
        if scale is not None:
            return _Quantised(source, scale)
    return None


def _unrounded(e: ex.Expr) -> ex.Expr:
    """`e` before it was made one of the types that models compute in."""
    while isinstance(e, ex.Apply) and e.op is ex.PointOp.CAST and e.dtype in _FLOATS and e.args[0].dtype in _FLOATS:
        e = e.args[0]
    return e


def _factors(e: ex.Expr) -> tuple[ex.Expr, ex.Expr]:
    """The two of a product; a scale of 1 is not written."""
    if isinstance(e, ex.Apply) and e.op is ex.PointOp.MUL:
        return e.args[0], e.args[1]
    return e, ex.Const(1.0, DType.F32)


def _converted(e: ex.Expr) -> int | None:
    """The input that `e` makes a float of, if that is all it does."""
    if isinstance(e, ex.Apply) and e.op is ex.PointOp.CAST and e.dtype in _FLOATS and isinstance(e.args[0], ex.Arg):
        return None if e.args[0].dtype in _FLOATS else e.args[0].index
    return None


def _scale(e: ex.Expr, node: Node) -> Scale | None:
    """The numbers that `e` is, if it is a scale."""
    e = _unrounded(e)
    if isinstance(e, ex.Const):
        return np.array(e.value, np.float32)
    if not isinstance(e, ex.Arg) or e.dtype not in _FLOATS:
        return None
    value = node.inputs[e.index]
    if value.data is not None:
        return value.data.astype(np.float32)
    return value if all(dim == 1 for dim in value.shape) and value.dtype is DType.F32 else None


def _viewed_scale(scale: Scale, op: Reshape | Transpose) -> Scale | None:
    """The scale of a view; None where it cannot be told."""
    if isinstance(scale, Value) or scale.size == 1:
        return scale
    if not isinstance(op, Transpose):
        return None
    full = scale.reshape((1,) * (len(op.perm) - scale.ndim) + scale.shape)
    return np.transpose(full, op.perm)


def _behind(node: Node, a: Scale, b: Scale) -> tuple[Scale, ...] | None:
    """The scales as they broadcast against the result; None where one varies along what is summed."""
    placed: list[Scale] = []
    for scale, summed in ((a, -1), (b, -2)):
        if isinstance(scale, Value):
            placed.append(scale)
        elif scale.size == 1:
            placed.append(scale.reshape(()))
        elif isinstance(node.op, Conv):
            outputs = scale.shape[0] if scale is b and scale.ndim == node.inputs[1].rank else 0
            if scale.size != outputs:
                return None
            placed.append(scale.reshape(outputs, *[1] * (scale.ndim - 2)))
        elif scale.ndim >= -summed and scale.shape[summed] != 1:
            return None
        else:
            placed.append(scale)
    first, second = placed
    if isinstance(first, Value) or isinstance(second, Value) or (first.ndim and second.ndim):
        return first, second
    return (first * second,)


def _viewed(editor: Editor, one: _Quantised, node: Node) -> Value:
    value = one.source
    for op in one.views:
        value = view(editor, op, value, node.origin)
    return value


def _argument(scale: Scale, operands: Operands, node: Node) -> ex.Expr:
    if isinstance(scale, Value):
        return operands.arg(scale)
    if not scale.ndim:
        return ex.const(scale.item(), DType.F32)
    return operands.arg(constant(f"{node.inputs[1].name}.scale", scale))
