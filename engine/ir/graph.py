"""Graph, Node and Value: the program that the frontend writes, the passes rewrite and the plan makes concrete.

A `Value` is a logical tensor: dtype, symbolic shape, and the order in which its dimensions lie in memory. A `Node`
applies an `Op` to values. A `Graph` is a list of nodes in topological order. Passes change graphs in place through the
few methods below, which keep the order and the links right; `validate` says what is wrong with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ModelError
from engine.ir.dim import Dim
from engine.ir.dtype import DType

if TYPE_CHECKING:
    from engine.ir.ops import Op

Shape = tuple[Dim, ...]


@dataclass(eq=False)
class Value:
    """A tensor of the graph.

    `shape` is the logical (ONNX) shape. `order` lists the dimensions from the outermost to the innermost in memory,
    None for row-major: an NHWC image is logically [N, C, H, W] with order (0, 2, 3, 1). `data` is the content of a
    constant, None for what is computed; it is never written to.
    """

    name: str
    dtype: DType
    shape: Shape
    data: np.ndarray | None = None
    order: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    def __repr__(self) -> str:
        dims = ", ".join(str(dim) for dim in self.shape)
        layout = "" if self.order is None else f" order={self.order}"
        return f"{self.name}: {self.dtype.value}[{dims}]{layout}"


@dataclass(eq=False)
class Node:
    """`outputs = op(inputs)`. `origin` names the ONNX node or nodes it came from, for messages and profiles."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    origin: str = ""

    @property
    def output(self) -> Value:
        """The only output. Most ops have one."""
        (value,) = self.outputs
        return value


@dataclass(eq=False)
class Graph:
    """A program: `nodes` in topological order, from `inputs` (and constants) to `outputs`.

    `output_names` are the names the model gives its outputs, whatever value ends up there.
    """

    name: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def producers(self) -> dict[Value, Node]:
        """The node that computes each value (inputs and constants have none)."""
        return {value: node for node in self.nodes for value in node.outputs}

    def users(self) -> dict[Value, list[Node]]:
        """The nodes that read each value, once per node. Graph outputs do not count: see `is_output`."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node)
        return found

    def is_output(self, value: Value) -> bool:
        return any(value is output for output in self.outputs)

    def add(self, op: Op, inputs: Sequence[Value], name: str = "", origin: str = "") -> tuple[Value, ...]:
        """Append a node, inferring its output types. Raises ShapeError/ModelError where the operands do not fit."""
        node = make_node(op, inputs, name, origin)
        self.nodes.append(node)
        return node.outputs

    def replace(self, old: Iterable[Node], new: Sequence[Node]) -> None:
        """Put `new` where the last of `old` stands and remove `old`."""
        gone = set(map(id, old))
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        kept_before = [node for node in self.nodes[:last] if id(node) not in gone]
        self.nodes = [*kept_before, *new, *self.nodes[last + 1 :]]

    def redirect(self, old: Value, new: Value) -> None:
        """Make every reader of `old` (nodes and graph outputs) read `new` instead."""
        for node in self.nodes:
            if old in node.inputs:
                node.inputs = tuple(new if value is old else value for value in node.inputs)
        self.outputs = [new if value is old else value for value in self.outputs]

    def remove_dead(self) -> bool:
        """Drop nodes whose outputs nobody reads. True where any was dropped."""
        live = set(map(id, self.outputs))
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(id(value) in live for value in node.outputs):
                kept.append(node)
                live.update(id(value) for value in node.inputs)
        changed = len(kept) != len(self.nodes)
        self.nodes = kept[::-1]
        return changed

    def sort(self) -> None:
        """Bring the nodes into topological order, keeping the present order where it is free. Raises ModelError on a
        cycle."""
        producer = self.producers()
        state: dict[int, bool] = {}
        ordered: list[Node] = []
        for root in self.nodes:
            stack = [(root, iter(root.inputs))]
            if id(root) in state:
                continue
            state[id(root)] = False
            while stack:
                node, pending = stack[-1]
                for value in pending:
                    before = producer.get(value)
                    if before is None or state.get(id(before)):
                        continue
                    if id(before) in state:
                        raise ModelError(f"the graph has a cycle through {before.origin or before.op.name!r}")
                    state[id(before)] = False
                    stack.append((before, iter(before.inputs)))
                    break
                else:
                    state[id(node)] = True
                    ordered.append(node)
                    stack.pop()
        self.nodes = ordered

    def validate(self) -> None:
        """Check order, links and types; raises AssertionError. Run after every pass in tests."""
        known = {id(value) for value in self.inputs}
        for node in self.nodes:
            for value in node.inputs:
                assert value.is_constant or id(value) in known, f"{value!r} is read before it is computed"
            inferred = node.op.infer(node.inputs)
            assert len(inferred) == len(node.outputs), f"{node.op} gives {len(inferred)} outputs"
            for value, (dtype, shape) in zip(node.outputs, inferred, strict=True):
                assert value.dtype is dtype, f"{value!r} should be {dtype}"
                assert len(value.shape) == len(shape), f"{value!r} should have shape {shape}"
                known.add(id(value))
        for value in self.outputs:
            assert value.is_constant or id(value) in known, f"output {value!r} is never computed"


def make_node(op: Op, inputs: Sequence[Value], name: str = "", origin: str = "") -> Node:
    """A node with fresh output values of the types that `op` infers."""
    types = op.infer(tuple(inputs))
    outputs = tuple(
        Value(name if len(types) == 1 else f"{name}.{i}", dtype, shape) for i, (dtype, shape) in enumerate(types)
    )
    return Node(op, tuple(inputs), outputs, origin or name)


def constant(name: str, data: np.ndarray) -> Value:
    """A constant value holding `data`."""
    return Value(name, DType.of(data.dtype), data.shape, data=data)
