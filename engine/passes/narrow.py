"""The pass `narrow_floats`: what a target stores in fewer bits than it computes in.

With `Traits.storage_type` f16 (or bf16), fp32 values between operators and the weights of matrix operators are kept in
that type; expressions still compute in fp32 and round once, when they store. Kept in fp32: the model's outputs, sums
(they outgrow the range), per-channel constants such as biases (they cost nothing), and what is computed from no stored
activation, such as attention masks (their lowest values must stay finite).
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value, make_node
from engine.ir.ops import Attention, Concat, Conv, Gemm, Norm, Op, Opaque, Pointwise, Reduce, ReduceKind, View
from engine.passes.traits import Traits

_F32 = DType.F32


def narrow_floats(graph: Graph, traits: Traits) -> None:
    """Retype the graph for the storage type, where that is not fp32. Runs last: it adds casts that nothing should
    move."""
    if traits.storage_type is not _F32:
        _Narrowing(graph, traits.storage_type).run()


class _Narrowing:
    def __init__(self, graph: Graph, storage: DType) -> None:
        self.graph = graph
        self.storage = storage
        self.nodes: list[Node] = []
        self.retyped: dict[Value, Value] = {}
        self.cast: dict[tuple[Value, DType], Value] = {}
        self.wide = _kept_wide(graph)

    def run(self) -> None:
        for node in self.graph.nodes:
            if isinstance(node.op, Opaque):
                node.inputs = tuple(self._as(self._now(value), value.dtype) for value in node.inputs)
            else:
                self._node(node)
            self.nodes.append(node)
        self.graph.outputs = [self._as(self._now(value), value.dtype) for value in self.graph.outputs]
        self.graph.nodes = self.nodes

    def _node(self, node: Node) -> None:
        before = node.inputs
        inputs = [self._now(value) for value in before]
        for i in _matrix_operands(node.op, inputs):
            inputs[i] = self._as(inputs[i], self.storage)
        if isinstance(node.op, Concat) and len({value.dtype for value in inputs}) > 1:
            inputs = [self._as(value, value.dtype if value.dtype is not self.storage else _F32) for value in inputs]
        for table, _ in getattr(node.op, "gathers", ()):
            if inputs[table].is_constant:
                inputs[table] = self._as(inputs[table], self.storage)
        node.inputs = tuple(inputs)
        node.op = self._with_types(node.op, node.inputs, node.outputs)
        outputs = []
        for value, (dtype, _) in zip(node.outputs, node.op.infer(node.inputs), strict=True):
            now = value
            if dtype is not value.dtype:
                now = Value(value.name, dtype, value.shape, order=value.order)
                self.retyped[value] = now
            outputs.append(now)
        node.outputs = tuple(outputs)

    def _now(self, value: Value) -> Value:
        return self.retyped.get(value, value)

    def _as(self, value: Value, dtype: DType) -> Value:
        """`value` in another float type: a converted constant, or a cast."""
        if value.dtype is dtype or not value.dtype.is_float or not dtype.is_float:
            return value
        found = self.cast.get((value, dtype))
        if found is None:
            if value.data is not None:
                with np.errstate(over="ignore"):
                    found = Value(value.name, dtype, value.shape, data=value.data.astype(dtype.numpy))
            else:
                node = make_node(
                    Pointwise((ex.cast(ex.Arg(0, value.dtype), dtype),)), (value,), f"{value.name}.{dtype.value}"
                )
                node.output.order = value.order
                self.nodes.append(node)
                found = node.output
            self.cast[value, dtype] = found
        return found

    def _with_types(self, op: Op, inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Op:
        """`op` with its expressions reading the inputs as they are stored now, and storing what is narrowed."""
        changes: dict[str, object] = {}
        for item in fields(op):
            if item.name == "source":
                changes["source"] = self._reading(getattr(op, item.name), inputs)
            elif item.name == "stores":
                narrow = self._narrows(op, inputs)
                changes["stores"] = tuple(
                    ex.cast(read, self.storage) if narrow and read.dtype is _F32 and value not in self.wide else read
                    for read, value in (
                        (self._reading(store, inputs), value)
                        for store, value in zip(getattr(op, item.name), outputs, strict=True)
                    )
                )
        return replace(op, **changes) if changes else op

    def _narrows(self, op: Op, inputs: tuple[Value, ...]) -> bool:
        if isinstance(op, Gemm | Conv | Attention | Norm):
            return True
        if isinstance(op, Reduce) and op.kind in (ReduceKind.SUM, ReduceKind.PROD):
            return False
        return any(value.dtype is self.storage for value in inputs)

    def _reading(self, root: ex.Expr, inputs: tuple[Value, ...]) -> ex.Expr:
        def leaf(e: ex.Expr) -> ex.Expr:
            if isinstance(e, ex.Arg) and e.dtype is _F32 and inputs[e.index].dtype is self.storage:
                return ex.cast(ex.Arg(e.index, self.storage), _F32)
            return e

        return ex.rewrite(root, leaf)


def _kept_wide(graph: Graph) -> set[Value]:
    """The model's outputs, and what they are views of."""
    wide = set(graph.outputs)
    for node in reversed(graph.nodes):
        if isinstance(node.op, View) and node.output in wide:
            wide.add(node.inputs[0])
    return wide


def _matrix_operands(op: Op, inputs: list[Value]) -> range:
    """The inputs that matrix instructions read. A convolution may read an image that the caller hands in as it is."""
    if isinstance(op, Attention):
        return range(3)
    if isinstance(op, Conv):
        return range(1, 2) if inputs[0].dtype is _F32 else range(2)
    return range(2 if isinstance(op, Gemm) else 0)
