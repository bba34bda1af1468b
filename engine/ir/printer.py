"""Graphs as text that people can read: one line per node. Used by `TILEWAVE_PRINT_AFTER`, `inspect` and test failures.

%conv1: f32[batch, 32, 112, 112] order=(0, 2, 3, 1) = Conv(%input, stem.weight, stem.bias) {strides=(2, 2)} : min(max((acc + stem.bias), 0), 6)
"""  # noqa: E501 - one line per node is the point

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from enum import Enum
from itertools import count

from engine.ir import expr as ex
from engine.ir.dim import Sym
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Op, Opaque

_EXPRESSIONS = {"stores", "source", "gathers", "mean", "hidden"}


def graph_text(graph: Graph) -> str:
    """The whole graph: inputs, nodes in order, outputs."""
    names = _Names(graph)
    lines = [f"graph {graph.name or '(unnamed)'}:"]
    lines += [f"  input  {names.typed(value)}" for value in graph.inputs]
    lines += [f"  {node_text(node, names)}" for node in graph.nodes]
    labels = [*graph.output_names, *[""] * len(graph.outputs)]
    lines += [f"  output {label}: {names[value]}" for label, value in zip(labels, graph.outputs, strict=False)]
    return "\n".join(lines)


def node_text(node: Node, names: _Names | None = None) -> str:
    """One node: ``outputs = Op(inputs) {attributes} : what its expressions say``."""
    names = names if names is not None else _Names()
    outputs = ", ".join(names.typed(value) for value in node.outputs)
    return f"{outputs} = {op_text(node.op, [names[value] for value in node.inputs])}"


def op_text(op: Op, args: Sequence[str]) -> str:
    """An operator applied to inputs called `args`: ``Op(args) {attributes} : what its expressions say``."""
    attributes = _attributes(op)
    return f"{op.name}({', '.join(args)})" + (f" {{{attributes}}}" if attributes else "") + _expressions(op, args)


class _Names:
    """Printed names: those of the values, made distinct where two values share one or have none."""

    def __init__(self, graph: Graph | None = None) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._fresh = count()
        if graph is not None:
            for value in (*graph.inputs, *(v for node in graph.nodes for v in (*node.outputs, *node.inputs))):
                self[value]

    def __getitem__(self, value: Value) -> str:
        if value not in self._names:
            name = value.name
            while not name or name in self._taken:
                name = f"{value.name}#{next(self._fresh)}"
            self._taken.add(name)
            self._names[value] = name
        name = self._names[value]
        if value.data is not None and value.data.size == 1 and value.data.dtype != object:
            return f"{name}={value.data.item():g}" if value.dtype.is_float else f"{name}={value.data.item()}"
        return name if value.is_constant else f"%{name}"

    def typed(self, value: Value) -> str:
        shape = ", ".join(str(dim) for dim in value.shape)
        order = "" if value.order is None else f" order={value.order}"
        return f"{self[value]}: {value.dtype.value}[{shape}]{order}"


def _attributes(op: Op) -> str:
    if isinstance(op, Opaque):
        return op.op_type
    parts = []
    for item in fields(op):
        value = getattr(op, item.name)
        if item.name in _EXPRESSIONS or value == item.default:
            continue
        parts.append(_attributes(value) if isinstance(value, Op) else f"{item.name}={_value(value)}")
    return ", ".join(filter(None, parts))


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Enum):
        return str(value.value)
    return str(value) if isinstance(value, Sym) else repr(value)


def _expressions(op: Op, names: Sequence[str]) -> str:
    args = list(names)
    for table, index in getattr(op, "gathers", ()):
        args[table] = f"{names[table]}[{names[index]}]"
    parts: list[str] = []
    source: ex.Expr | None = getattr(op, "source", None)
    if source is not None and not isinstance(source, ex.Arg):
        parts.append(f"of {ex.to_text(source, args)}")
    hidden: ex.Expr | None = getattr(op, "hidden", None)
    if hidden is not None:
        parts.append(ex.to_text(hidden, args))
    stores: Iterable[ex.Expr] = getattr(op, "stores", ())
    if any(not isinstance(store, ex.Acc) for store in stores):
        parts.append("; ".join(ex.to_text(store, args) for store in stores))
    return f" : {' -> '.join(parts)}" if parts else ""
