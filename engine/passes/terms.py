"""Values as expressions: every value of a graph written over the values that are not point-wise.

Recognising a norm or an attention means following data flow through point-wise nodes, however these are cut: one ONNX
operator each, or fused already. `Terms` writes each value as one expression whose leaves (`Arg(i)`, in a numbering of
the whole graph) are the values that no point-wise node computes. Broadcast views are looked through, for a
right-aligned broadcast means the same one step later. A leaf can also be the raw accumulator of a `Reduce`, before its
epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Node, Shape, Value
from engine.ir.ops import Expand, Pointwise, Reduce, Reshape
from engine.passes.editor import Editor


@dataclass(frozen=True, eq=False)
class Reduction:
    """The accumulator of the reduction `node`, whose source is the expression `source` over the graph's leaves."""

    node: Node
    op: Reduce
    source: ex.Expr


class Terms:
    """The expressions of a graph as it is when this is made; nodes added later are not seen."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._leaves: list[Value | Reduction] = []
        self._expressions: dict[Value, ex.Expr] = {}
        self._values: dict[ex.Expr, list[Value]] = {}
        self._interned: dict[ex.Expr, ex.Expr] = {}
        for node in editor.nodes():
            self._enter(node)

    def of(self, value: Value) -> ex.Expr:
        """The expression of a value."""
        known = self._expressions.get(value)
        if known is None:
            known = self._register(value, self._leaf(value))
        return known

    def leaf(self, e: ex.Expr) -> Value | Reduction | None:
        """What the leaf `e` stands for; None where `e` is no leaf."""
        return self._leaves[e.index] if isinstance(e, ex.Arg) else None

    def value(self, e: ex.Expr, shape: Shape | None = None) -> Value | None:
        """The first value of the graph that holds `e` (before it is broadcast), or the one of the shape given."""
        return next((v for v in self._values.get(e, ()) if shape is None or v.shape == shape), None)

    def lower(self, e: ex.Expr, given: dict[ex.Expr, Value] | None = None) -> tuple[ex.Expr, list[Value]] | None:
        """`e` over as few values of the graph as say it: (expression, the values that its arguments are).

        Sub-expressions that a value already holds are read from it; `given` adds values that hold further ones. None
        where that would need an accumulator which no value holds. Broadcasts are left out: check the shape.
        """
        inputs: dict[Value, int] = {}
        given = given if given is not None else {}

        def build(part: ex.Expr) -> ex.Expr | None:
            if isinstance(part, ex.Const):
                return part
            value = given.get(part) or self.value(part)
            if value is not None and part is not e:
                return ex.Arg(inputs.setdefault(value, len(inputs)), value.dtype)
            if not isinstance(part, ex.Apply):
                return None
            args = [build(arg) for arg in part.args]
            return None if None in args else ex.Apply(part.op, tuple(a for a in args if a is not None), part.dtype)

        built = build(e)
        return None if built is None else (built, list(inputs))

    def over(self, e: ex.Expr, inputs: Sequence[Value]) -> ex.Expr:
        """The local expression `e` of a node that reads `inputs`, over the leaves of the graph."""
        done: dict[ex.Expr, ex.Expr] = {}
        for part in ex.walk(e):
            if isinstance(part, ex.Arg):
                done[part] = self.of(inputs[part.index])
            elif isinstance(part, ex.Apply):
                done[part] = self._intern(ex.Apply(part.op, tuple(done[arg] for arg in part.args), part.dtype))
            else:
                done[part] = self._intern(part)
        return done[e]

    def _enter(self, node: Node) -> None:
        op = node.op
        if isinstance(op, Pointwise) and not op.gathers:
            for value, store in zip(node.outputs, op.stores, strict=True):
                self._register(value, self.over(store, node.inputs))
        elif isinstance(op, Expand) or (isinstance(op, Reshape) and _adds_leading_axes(op, node.inputs[0])):
            self._register(node.output, self.of(node.inputs[0]))
        elif isinstance(op, Reduce):
            raw = self._leaf(Reduction(node, op, self.over(op.source, node.inputs)))
            for value, store in zip(node.outputs, op.stores, strict=True):
                if all(isinstance(part, ex.Acc | ex.Const | ex.Apply) for part in ex.walk(store)):
                    self._register(value, self._intern(ex.replace_acc(store, raw)))

    def _leaf(self, what: Value | Reduction) -> ex.Expr:
        if isinstance(what, Value):
            if what.data is not None and what.data.size == 1 and what.dtype is not DType.STRING:
                return self._intern(ex.const(what.data.item(), what.dtype))
            dtype = what.dtype
        else:
            dtype = what.op.source.dtype
        self._leaves.append(what)
        return self._intern(ex.Arg(len(self._leaves) - 1, dtype))

    def _register(self, value: Value, e: ex.Expr) -> ex.Expr:
        self._expressions[value] = e
        self._values.setdefault(e, []).append(value)
        return e

    def _intern(self, e: ex.Expr) -> ex.Expr:
        # With one object per distinct expression, comparing deep expressions never descends.
        return self._interned.setdefault(e, e)


def _adds_leading_axes(op: Reshape, source: Value) -> bool:
    extra = len(op.shape) - source.rank
    return extra >= 0 and op.shape == (*[1] * extra, *source.shape)


def without_casts(e: ex.Expr) -> ex.Expr:
    """`e` without the conversions between float types around it."""
    while isinstance(e, ex.Apply) and e.op is ex.PointOp.CAST and e.dtype.is_float and e.args[0].dtype.is_float:
        e = e.args[0]
    return e


def same(a: ex.Expr, b: ex.Expr) -> bool:
    """Whether two expressions are equal but for float conversions around them."""
    return without_casts(a) == without_casts(b)
