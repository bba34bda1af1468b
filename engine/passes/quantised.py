"""The pass `multiply_quantised`: products of two dequantised tensors become products of what they were made of.

Dequantisation, as DequantizeLinear writes it, is a conversion, less a zero point, times a scale. Where the target
multiplies the narrow type itself (`Traits.product_types`) and both operands of a product are dequantised from it, the
scales go behind the sum, into the epilogue: a number for all, or one for every row of the first operand, every column
of the second. A scale that varies along k stays where it is. So does a zero point of the second operand; one number of
the first goes behind the sum, too, where the second is constant: it is taken away as often as a column of that adds up
to. Unsigned integers become signed ones of 128 less. Views between the two move to the narrow tensor. Others that read
the dequantised tensor keep it. A QuantizeLinear behind the product then becomes its store (`fuse_epilogues`), as any
expression does.

It comes before constants are folded: a dequantised weight would be one of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Conv, Gemm, Pointwise, Reshape, Transpose
from engine.passes.editor import Editor
from engine.passes.operands import Operands, is_matrix_product, stores_of, with_expressions
from engine.passes.traits import Traits
from engine.passes.views import view

Numbers: TypeAlias = np.ndarray | Value
"""Constant numbers that broadcast against the tensor, or one computed number."""
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_QUANTISED = (DType.F8E4M3, DType.I8, DType.U8)
_WHOLE_LINES = 16  # bytes: channels of an image that kernels read as rows of a matrix
_MIDDLE = 128  # between the smallest and the largest unsigned integer of 8 bits


@dataclass(frozen=True)
class _Quantised:
    """`views` of `source`, the first one first, less `zero`, times `scale`, which are those of the result."""

    source: Value
    scale: Numbers
    zero: Numbers
    views: tuple[Reshape | Transpose, ...] = ()

    @property
    def dtype(self) -> DType:
        """What is multiplied."""
        return DType.I8 if self.source.dtype is DType.U8 else self.source.dtype

    @property
    def is_symmetric(self) -> bool:
        """Whether what is multiplied has no zero point."""
        middle = _MIDDLE if self.source.dtype is DType.U8 else 0
        return not isinstance(self.zero, Value) and bool(np.all(self.zero == middle))


def multiply_quantised(graph: Graph, traits: Traits) -> None:
    """Rewrite every product whose operands are dequantised from a type that the target multiplies."""
    if not traits.product_types:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Gemm) or _is_product_of_lines(node):
            _rewrite(editor, node, traits)
    editor.finish()


def _is_product_of_lines(node: Node) -> bool:
    """Whether a node is a convolution whose channels, of known number, come in whole lines."""
    if not is_matrix_product(node):
        return False
    channels = node.inputs[1].shape[1]
    return isinstance(channels, int) and channels % _WHOLE_LINES == 0


def _rewrite(editor: Editor, node: Node, traits: Traits) -> None:
    a, b = (_dequantised(editor, value) for value in node.inputs[:2])
    if a is None or b is None or a.dtype is not b.dtype or a.dtype not in traits.product_types:
        return
    if isinstance(node.op, Conv) and not (a.dtype.is_float and a.is_symmetric):
        return  # images of integers have no kernel, and what columns add up to is that of a matrix
    accumulators = {leaf for leaf in ex.walk(*stores_of(node.op)) if isinstance(leaf, ex.Acc)}
    if accumulators != {ex.Acc(DType.F32)} or any(value in node.inputs[2:] for value in node.inputs[:2]):
        return
    columns = None if a.is_symmetric else _column_sums(b)
    scales = _behind(node, a.scale, b.scale)
    one_zero = isinstance(a.zero, Value) or a.zero.size == 1
    if scales is None or not b.is_symmetric or (columns is None and not a.is_symmetric) or not one_zero:
        return
    operands = Operands([_viewed(editor, one, node) for one in (a, b)])
    total: ex.Expr = ex.Acc(DType.F32)
    if columns is not None:
        taken = ex.apply(PointOp.MUL, _zero(a, operands), _argument(columns, operands, node, "sums"))
        total = ex.apply(PointOp.SUB, total, taken)
    for scale in scales:
        total = ex.apply(PointOp.MUL, total, _argument(scale, operands, node, "scale"))
    stores = tuple(ex.replace_acc(operands.adopt(store, node), total) for store in stores_of(node.op))
    before = node.inputs[:2]
    editor.update(node, with_expressions(node.op, stores), operands.inputs)
    editor.prune(before)


# What a tensor was dequantised from


def _dequantised(editor: Editor, value: Value) -> _Quantised | None:
    node = editor.producer(value)
    if node is None:
        return None
    if isinstance(node.op, Reshape | Transpose):
        inner = _dequantised(editor, node.inputs[0])
        if inner is None:
            return None
        scale, zero = (_seen_through(numbers, node.op) for numbers in (inner.scale, inner.zero))
        if scale is None or zero is None:
            return None
        return replace(inner, scale=scale, zero=zero, views=(*inner.views, node.op))
    if not isinstance(node.op, Pointwise) or node.op.gathers or len(node.op.stores) != 1:
        return None
    store = _unrounded(node.op.stores[0])
    if isinstance(store, ex.Arg) and store.dtype in _FLOATS and node.inputs[store.index].shape == value.shape:
        return _dequantised(editor, node.inputs[store.index])  # made another of the types that models compute in
    factors = _factors(store)
    for one, other in (factors, factors[::-1]):
        levels, zero = _levels(one, node)
        scale = _numbers(other, node)
        if levels is not None and levels.shape == value.shape and zero is not None and scale is not None:
            return _Quantised(levels, scale, zero)
    return None


def _unrounded(e: ex.Expr) -> ex.Expr:
    """`e` before it was made one of the types that models compute in."""
    while isinstance(e, ex.Apply) and e.op is PointOp.CAST and e.dtype in _FLOATS and e.args[0].dtype in _FLOATS:
        e = e.args[0]
    return e


def _factors(e: ex.Expr) -> tuple[ex.Expr, ex.Expr]:
    """The two of a product; a scale of 1 is not written."""
    if isinstance(e, ex.Apply) and e.op is PointOp.MUL:
        return e.args[0], e.args[1]
    return e, ex.Const(1.0, DType.F32)


def _levels(e: ex.Expr, node: Node) -> tuple[Value | None, Numbers | None]:
    """The quantised tensor that `e` makes floats of, and its zero point."""
    zero: Numbers | None = np.zeros((), np.float32)
    if isinstance(e, ex.Apply) and e.op is PointOp.SUB:
        zero = _numbers(e.args[1], node)
        e = e.args[0]
    if not isinstance(e, ex.Apply) or e.op is not PointOp.CAST or e.dtype not in _FLOATS:
        return None, None
    levels = e.args[0]
    return (node.inputs[levels.index] if isinstance(levels, ex.Arg) and levels.dtype in _QUANTISED else None), zero


def _numbers(e: ex.Expr, node: Node) -> Numbers | None:
    """The numbers that `e` is, constants or one that is computed."""
    if isinstance(e, ex.Apply) and e.op is PointOp.CAST and e.dtype in _FLOATS:
        e = e.args[0]
    if isinstance(e, ex.Const):
        return np.array(e.value, np.float32)
    if not isinstance(e, ex.Arg):
        return None
    value = node.inputs[e.index]
    if value.data is not None:
        return value.data.astype(np.float32)
    known = value.dtype in (*_FLOATS, *_QUANTISED)
    return value if known and all(dim == 1 for dim in value.shape) else None


def _seen_through(numbers: Numbers, op: Reshape | Transpose) -> Numbers | None:
    """Those of a view; None where they cannot be told."""
    if isinstance(numbers, Value):
        return numbers
    if numbers.size == 1:
        return numbers.reshape(())
    if not isinstance(op, Transpose):
        return None
    full = numbers.reshape((1,) * (len(op.perm) - numbers.ndim) + numbers.shape)
    return np.transpose(full, op.perm)


# What the product becomes


def _behind(node: Node, a: Numbers, b: Numbers) -> tuple[Numbers, ...] | None:
    """The scales as they broadcast against the result; None where one varies along what is summed."""
    placed: list[Numbers] = []
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


def _column_sums(b: _Quantised) -> np.ndarray | None:
    """What the columns of a constant matrix add up to, as a row."""
    if b.source.data is None:
        return None
    data = b.source.data.astype(np.float64) - (_MIDDLE if b.source.dtype is DType.U8 else 0)
    for op in b.views:
        if not isinstance(op, Transpose):
            return None
        data = np.transpose(data, op.perm)
    sums: np.ndarray = data.sum(axis=-2, keepdims=True).astype(np.float32)
    return sums


def _zero(a: _Quantised, operands: Operands) -> ex.Expr:
    """The zero point of the first operand as it is multiplied, one number."""
    middle = _MIDDLE if a.source.dtype is DType.U8 else 0
    if isinstance(a.zero, Value):
        computed = ex.cast(operands.arg(a.zero), DType.F32)
        return ex.apply(PointOp.SUB, computed, ex.const(float(middle))) if middle else computed
    return ex.const(float(a.zero.reshape(()) - middle))


def _viewed(editor: Editor, one: _Quantised, node: Node) -> Value:
    value = one.source
    if value.dtype is DType.U8:
        shifted = ex.apply(PointOp.SUB, ex.cast(ex.Arg(0, DType.U8), DType.F32), ex.const(float(_MIDDLE)))
        signed = Pointwise((ex.cast(shifted, DType.I8),))
        value = editor.add(signed, (value,), value.name, node.origin).output
    for op in one.views:
        value = view(editor, op, value, node.origin)
    return value


def _argument(numbers: Numbers, operands: Operands, node: Node, what: str) -> ex.Expr:
    if isinstance(numbers, Value):
        return ex.cast(operands.arg(numbers), DType.F32)
    if not numbers.ndim:
        return ex.const(numbers.item(), DType.F32)
    return operands.arg(constant(f"{node.inputs[1].name}.{what}", numbers))
