"""The pass `widen_floats`: float types that the target does not compute in are carried as fp32 inside the graph.

Weights are converted, values and expressions retyped, and the casts that remain stand at the graph's inputs and outputs
and around foreign operators, whose types are ONNX's. Roundings to the narrow type in between are dropped.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Const, Expr
from engine.ir.graph import Graph, Node, Value, make_node
from engine.ir.ops import Op, Opaque, Pointwise
from engine.passes.traits import Traits

_FLOATS = (DType.F64, DType.F32, DType.F16, DType.BF16)


def widen_floats(graph: Graph, traits: Traits) -> None:
    """Retype the graph where it has float types that are not among the target's."""
    narrow = frozenset(dtype for dtype in _FLOATS if dtype not in traits.float_types)
    values = (*graph.inputs, *graph.outputs, *(v for node in graph.nodes for v in (*node.inputs, *node.outputs)))
    if any(value.dtype in narrow for value in values):
        _widen(graph, narrow)


def _widen(graph: Graph, narrow: frozenset[DType]) -> None:
    wide: dict[Value, Value] = {}
    nodes: list[Node] = []

    def converted(value: Value, dtype: DType) -> Value:
        """`value` cast to `dtype` by a node, or by NumPy for a constant."""
        if value.data is not None:
            with np.errstate(over="ignore"):
                data = value.data.astype(dtype.numpy)
            return Value(value.name, dtype, value.shape, data=data)
        node = make_node(Pointwise((ex.cast(ex.Arg(0, value.dtype), dtype),)), (value,), value.name)
        nodes.append(node)
        return node.output

    def widened(value: Value) -> Value:
        if value.dtype not in narrow:
            return value
        if value not in wide:
            wide[value] = converted(value, DType.F32)
        return wide[value]

    computed = {value for node in graph.nodes if not isinstance(node.op, Opaque) for value in node.outputs}

    def original(value: Value) -> Value:
        """`value` in the type that the model gives it."""
        return converted(wide[value], value.dtype) if value in computed and value in wide else value

    for node in graph.nodes:
        if isinstance(node.op, Opaque):
            node.inputs = tuple(original(value) for value in node.inputs)
            nodes.append(node)
            continue
        node.inputs = tuple(widened(value) for value in node.inputs)
        results = []
        for value in node.outputs:
            if value.dtype in narrow:
                wide[value] = Value(value.name, DType.F32, value.shape, order=value.order)
            results.append(wide.get(value, value))
        node.op, node.outputs = _retyped(node.op, narrow), tuple(results)
        nodes.append(node)
    graph.outputs = [original(value) for value in graph.outputs]
    graph.nodes = nodes


def _retyped(op: Op, narrow: frozenset[DType]) -> Op:
    """`op` with fp32 in place of the narrow types in its expressions and attributes."""
    changes: dict[str, object] = {}
    for item in fields(op):
        value = getattr(op, item.name)
        if isinstance(value, DType) and value in narrow:
            changes[item.name] = DType.F32
        elif item.name == "source":
            changes[item.name] = _retyped_expression(value, narrow)
        elif item.name == "stores":
            changes[item.name] = tuple(_retyped_expression(store, narrow) for store in value)
    return replace(op, **changes) if changes else op


def _retyped_expression(root: Expr, narrow: frozenset[DType]) -> Expr:
    done: dict[Expr, Expr] = {}
    for e in ex.walk(root):
        if e.dtype not in narrow and not isinstance(e, Apply):
            done[e] = e
        elif isinstance(e, ex.Arg):
            done[e] = ex.Arg(e.index, DType.F32)
        elif isinstance(e, Const):
            done[e] = Const(e.value, DType.F32)
        elif isinstance(e, Apply):
            args = tuple(done[arg] for arg in e.args)
            dtype = DType.F32 if e.dtype in narrow else e.dtype
            done[e] = ex.cast(args[0], dtype) if e.op is ex.PointOp.CAST else Apply(e.op, args, dtype)
        else:
            done[e] = ex.Acc(DType.F32)
    return done[root]
