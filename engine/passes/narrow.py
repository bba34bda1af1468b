"""The pass `narrow_floats`: fp32 activations and weights are stored in the target's narrower type,
`Traits.storage_type`.

Arithmetic stays fp32: an expression widens what it reads and rounds once, when it stores. Only memory changes, and the
operands of matrix units. What stays fp32 in memory: the model's inputs and outputs, scores and masks of softmax and
attention, sums, biases, scales of norms, numbers out of the narrow range, and what foreign operators touch. A product
that needs such a tensor reads a rounded copy, which the operator that computes it writes beside it where it can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value, make_node
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    Gather,
    Gemm,
    Pad,
    Pointwise,
    Recurrent,
    Reduce,
    ReduceKind,
    Scatter,
    ScatterKind,
    Softmax,
    Undefined,
    View,
)
from engine.passes.epilogues import fuse_epilogues
from engine.passes.operands import FUSED_OPS, fixed_operands, gathers_of, stores_of, with_expressions
from engine.passes.traits import Traits

_MOVES = (View, Concat, Pad, Gather, Scatter, Undefined)
"""Operators whose result has the type of what they move."""
_FUSED = (*FUSED_OPS, Pointwise)


def narrow_floats(graph: Graph, traits: Traits) -> None:
    """Retype the graph where the target stores floats in a type narrower than fp32."""
    if traits.storage_type is not DType.F32:
        narrowing = _Narrowing(graph, traits.storage_type)
        narrowing.run()
        if narrowing.copies:
            fuse_epilogues(graph, traits)


@dataclass
class _Narrowing:
    graph: Graph
    storage: DType
    narrow: dict[Value, Value] = field(default_factory=dict)
    """The narrow value in the place of each fp32 one (constants included)."""
    copies: dict[Value, Value] = field(default_factory=dict)
    """Rounded copies of values that stay fp32."""
    nodes: list[Node] = field(default_factory=list)

    def run(self) -> None:
        wide = _wide_values(self.graph, self.storage)
        for node in self.graph.nodes:
            for value in node.outputs:
                if value.dtype is DType.F32 and value not in wide:
                    self.narrow[value] = Value(value.name, self.storage, value.shape, order=value.order)
        for node in self.graph.nodes:
            if isinstance(node.op, _FUSED):
                self._fused(node)
            elif isinstance(node.op, _MOVES):
                self._moved(node)
            elif isinstance(node.op, Recurrent):
                self._recurrent(node)
            self.nodes.append(node)
        self.graph.nodes = self.nodes

    def _moved(self, node: Node) -> None:
        if node.output in self.narrow:
            node.inputs = tuple(
                self._constant(value) if value.is_constant else self.narrow.get(value, value) for value in node.inputs
            )
            node.outputs = (self.narrow[node.output],)

    def _recurrent(self, node: Node) -> None:
        """The weights, which every step reads; gates and states stay fp32."""
        x, weights, *others = node.inputs
        if weights.is_constant and _holds(self.storage, weights.data):
            node.inputs = (x, self._constant(weights), *others)

    def _fused(self, node: Node) -> None:
        op = node.op
        fixed = fixed_operands(op)
        tables = {table for table, _ in gathers_of(op)}
        inputs = list(node.inputs)
        for i, value in enumerate(node.inputs):
            if value.dtype is not DType.F32:
                continue
            if i < fixed and isinstance(op, Gemm | Conv | Attention):
                inputs[i] = self._operand(op, i, value)
            elif value in self.narrow or (i in tables and value.is_constant and _holds(self.storage, value.data)):
                inputs[i] = self.narrow.get(value) or self._constant(value)
        stores = tuple(
            self._stored(self._widened(store, inputs), value)
            for store, value in zip(stores_of(op), node.outputs, strict=True)
        )
        source = getattr(op, "source", None)
        node.op = with_expressions(op, stores, None if source is None else self._widened(source, inputs))
        node.inputs = tuple(inputs)
        node.outputs = tuple(self.narrow.get(value, value) for value in node.outputs)

    def _operand(self, op: Gemm | Conv | Attention, i: int, value: Value) -> Value:
        """What a matrix unit reads for `value`."""
        if isinstance(op, Attention) and i == 3:
            return value
        if value.is_constant:
            return self._constant(value)
        if value in self.narrow:
            return self.narrow[value]
        if isinstance(op, Conv) and i == 0 and value in self.graph.inputs:
            return value  # the kernel rounds the image as it reads it, which saves a pass over it
        if value not in self.copies:
            copy = make_node(Pointwise((ex.cast(ex.Arg(0, DType.F32), self.storage),)), (value,), value.name)
            self.nodes.append(copy)
            self.copies[value] = copy.output
        return self.copies[value]

    def _constant(self, value: Value) -> Value:
        """The constant in the narrow type."""
        if value.dtype is not DType.F32:
            return value
        if value not in self.narrow:
            assert value.data is not None
            with np.errstate(over="ignore"):
                data = value.data.astype(self.storage.numpy)
            self.narrow[value] = Value(value.name, self.storage, value.shape, data=data)
        return self.narrow[value]

    def _widened(self, e: ex.Expr, inputs: list[Value]) -> ex.Expr:
        """The expression over the inputs as they are now, computing in fp32 as before."""

        def leaf(part: ex.Expr) -> ex.Expr:
            if isinstance(part, ex.Arg) and inputs[part.index].dtype is not part.dtype:
                return ex.cast(ex.Arg(part.index, inputs[part.index].dtype), part.dtype)
            return part

        return ex.rewrite(e, leaf)

    def _stored(self, store: ex.Expr, value: Value) -> ex.Expr:
        """The store of `value`, rounded where it is stored narrow."""
        if value not in self.narrow:
            return store
        if isinstance(store, ex.Apply) and store.op is ex.PointOp.CAST and store.args[0].dtype is self.storage:
            return store.args[0]  # widened only to be rounded again
        return ex.cast(store, self.storage)


def _wide_values(graph: Graph, storage: DType) -> set[Value]:
    """The computed fp32 values that must stay so, and all that share their memory or are moved into it."""
    groups = _Groups()
    wide: set[Value] = {*graph.inputs, *graph.outputs}
    for node in graph.nodes:
        op = node.op
        if isinstance(op, _MOVES):
            moved = node.inputs if isinstance(op, Concat) else node.inputs[:1]
            if isinstance(op, Scatter):
                moved = (node.inputs[0], node.inputs[2])
                if op.kind in (ScatterKind.ADD, ScatterKind.MUL):  # sums of any length
                    wide.add(node.output)
            groups.join((*moved, node.output))
        elif not isinstance(op, _FUSED):
            wide.update((*node.inputs, *node.outputs))
        elif isinstance(op, Softmax):
            wide.update(node.inputs[i] for i in ex.arguments(op.source))
        elif isinstance(op, Attention) and op.has_bias:
            wide.add(node.inputs[3])
        elif isinstance(op, Reduce) and op.kind in (ReduceKind.SUM, ReduceKind.PROD):
            wide.update(node.outputs)
        if isinstance(op, Pointwise) and not _numbers_fit(node, storage):
            wide.update(node.outputs)
        if isinstance(op, Pointwise) and any(value.dtype.is_int for value in node.outputs):
            wide.update(node.inputs)  # what places are computed from: a rounded coordinate is another pixel
    return groups.closed_over(value for value in wide if not value.is_constant)


class _Groups:
    """Values that must have one type, as disjoint sets."""

    def __init__(self) -> None:
        self._parent: dict[Value, Value] = {}

    def join(self, values: Iterable[Value]) -> None:
        first, *others = (self._root(value) for value in values if not value.is_constant)
        for other in others:
            self._parent[other] = first

    def _root(self, value: Value) -> Value:
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def closed_over(self, values: Iterable[Value]) -> set[Value]:
        """`values` and every member of their sets."""
        given = set(values)
        roots = {self._root(value) for value in given}
        return given | roots | {value for value in self._parent if self._root(value) in roots}


def _numbers_fit(node: Node, storage: DType) -> bool:
    """Whether every number in the expressions of a point-wise node is within the range of the narrow type (masks often
    hold the lowest fp32 number)."""
    limit = _largest(storage)
    for e in ex.walk(*stores_of(node.op)):
        if isinstance(e, ex.Const) and e.dtype.is_float and abs(e.value) > limit and np.isfinite(e.value):
            return False
    return all(value.data is None or not value.dtype.is_float or _holds(storage, value.data) for value in node.inputs)


def _holds(storage: DType, data: np.ndarray | None) -> bool:
    """Whether the finite elements of `data` stay finite in the narrow type."""
    if data is None or not data.size:
        return True
    finite = data[np.isfinite(data)]
    return not finite.size or float(np.abs(finite).max()) <= _largest(storage)


def _largest(storage: DType) -> float:
    return {DType.F16: 65504.0, DType.BF16: 3.3895313892515355e38}[storage]
