"""Builds the IR graph node by node while a model is read; keeps what is known of small tensors' contents.

One `Builder` per model; `OnnxNode` (what operator functions receive) adds nodes through it. A node whose result is
certain while reading (see `content`) is not added: its result becomes a constant, or a *pending* value of symbolic
sizes that turns into a `ShapeTensor` only when something reads it as data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from engine.errors import ModelError
from engine.frontend import content, grid
from engine.frontend.bounds import complexity
from engine.frontend.elements import MAX_TERMS, Element, Ratio, objects
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, Sym, is_symbol
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops.light import operand_shape

Array = np.ndarray[Any, Any]

_MAX_SIZE = 2**62  # elements along an axis, or in a tensor, that any arithmetic on sizes can still count


class Builder:
    """The graph under construction. `equal_symbols` collects pairs of symbols that the model needs to be equal."""

    def __init__(self, name: str) -> None:
        self.graph = Graph(name)
        self.equal_symbols: dict[tuple[str, str], None] = {}
        self._elements: dict[Value, Array] = {}
        self._pending: dict[Value, None] = {}
        self._grids: dict[Value, Element | None] = {}
        self._makers: dict[Value, Node] = {}
        self._sequences: dict[Value, tuple[Value, ...]] = {}
        self._named: set[Value] = set()

    # --- values -------------------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: DType, shape: tuple[Dim, ...]) -> Value:
        value = Value(name, dtype, shape)
        self.graph.inputs.append(value)
        self._named.add(value)
        return value

    def constant(self, array: Array, name: str = "") -> Value:
        """A constant value; `name` is given only to tensors that have one in the model."""
        array = np.asarray(array)
        value = Value(name, DType.of(array.dtype), array.shape, data=array)
        if name:
            self._named.add(value)
        return value

    def sizes(self, elements: Sequence[Element], shape: tuple[int, ...], dtype: DType = DType.I64) -> Value:
        """A tensor of sizes, known while reading."""
        return self._known(objects(elements, shape), dtype)

    def _known(self, array: Array, dtype: DType) -> Value:
        if not any(isinstance(element, (Sym, Ratio)) for element in array.flat if array.dtype == object):
            return self.constant(np.array(array, dtype.numpy, order="C"))
        value = Value("", dtype, array.shape)
        self._elements[value] = array
        self._pending[value] = None
        return value

    def sequence(self, elements: Sequence[Value]) -> Value:
        """A stand-in for a sequence of tensors, which no node of the graph may read."""
        value = Value("", DType.STRING, ())
        self._sequences[value] = tuple(elements)
        return value

    def elements(self, value: Value) -> tuple[Value, ...] | None:
        """The elements of a sequence, None for a tensor."""
        return self._sequences.get(value)

    def name(self, value: Value, name: str) -> None:
        """Give a computed value the name that the model has for it; the first name stays."""
        if value not in self._named:
            value.name = name
            self._named.add(value)

    def content(self, value: Value) -> Array | None:
        """Numbers or sizes in `value` where they are known (object arrays for sizes), else None."""
        if value.data is not None:
            return value.data if value.data.size <= content.MAX_NUMBERS else None
        return self._elements.get(value)

    def grid(self, value: Value) -> Element | None:
        """The elements as a function of their position (see `grid.py`), where they are one."""
        if value not in self._grids:
            known = self._elements.get(value)
            one = known is not None and known.size == 1
            self._grids[value] = known.reshape(()).item() if known is not None and one else grid.of_constant(value)
        return self._grids[value]

    def maker(self, value: Value) -> Node | None:
        """The node that computes `value`; None for inputs, constants and tensors of sizes."""
        return self._makers.get(value)

    def data(self, value: Value) -> Value:
        """`value`, computed by a node if it was pending."""
        if value in self._sequences:
            raise ModelError(f"{value.name!r} is a sequence of tensors where a tensor is needed")
        if value not in self._pending:
            return value
        del self._pending[value]
        elements = list(self._elements[value].flat)
        whole = [e.numerator if isinstance(e, Ratio) else e for e in elements]
        sizes: list[Dim] = [e if isinstance(e, Sym) else int(e) for e in whole]
        shape = value.shape
        if value.dtype.is_int:
            self.graph.nodes.append(Node(ops.ShapeTensor(shape, tuple(sizes), value.dtype), (), (value,), value.name))
            return value
        (counts,) = self.graph.add(ops.ShapeTensor(shape, tuple(sizes)), (), f"{value.name}/sizes")
        divisors = np.array([e.denominator if isinstance(e, Ratio) else 1 for e in elements])
        divisor = self.constant(divisors.astype(value.dtype.numpy).reshape(self._elements[value].shape))
        quotient = ex.apply(ex.PointOp.DIV, ex.cast(ex.Arg(0, DType.I64), value.dtype), ex.Arg(1, value.dtype))
        self.graph.nodes.append(Node(ops.Pointwise((quotient,)), (counts, divisor), (value,), value.name))
        return value

    # --- nodes --------------------------------------------------------------------------------------------------------

    def add(self, op: ops.Op, inputs: Sequence[Value], origin: str) -> tuple[Value, ...]:
        """The results of `op`: known contents where they are certain, else those of a new node of the graph."""
        if any(value in self._sequences for value in inputs):
            raise ModelError("a sequence of tensors where a tensor is needed")
        types = op.infer(tuple(inputs))
        for _, shape in types:
            _check_shape(shape, op.name)
        known = content.evaluate(op, inputs, [self.content(value) for value in inputs])
        if known is not None:
            return tuple(self._known(array, dtype) for array, (dtype, _) in zip(known, types, strict=True))
        pattern = grid.evaluate(op, inputs, [self.grid(value) for value in inputs]) if grid.handles(op) else None
        if isinstance(pattern, (bool, int, float)) and not (isinstance(op, ops.Expand) and inputs[0].is_constant):
            # The same number everywhere: a broadcast constant says so to everything that reads it.
            ((dtype, shape),) = types
            number = self.constant(np.full((1,) * len(shape), pattern, dtype.numpy))
            return self.add(ops.Expand(shape), [number], origin)
        for a, b in _equal_dims(op, inputs):
            if a != b and is_symbol(a) and is_symbol(b):
                self.equal_symbols[str(a), str(b)] = None
        outputs = tuple(Value("", dtype, shape) for dtype, shape in types)
        node = Node(op, tuple(self.data(value) for value in inputs), outputs, origin)
        self.graph.nodes.append(node)
        self._makers.update((value, node) for value in outputs)
        if pattern is not None:
            self._grids[outputs[0]] = pattern
        return outputs

    def finish(self, outputs: Sequence[tuple[str, Value]]) -> Graph:
        """The graph, with `outputs` (name, value), without nodes that nobody reads, and with every value named."""
        for name, value in outputs:
            self.name(value, name)
            self.graph.outputs.append(self.data(value))
            self.graph.output_names.append(name)
        self.graph.remove_dead()
        self._name_the_rest()
        return self.graph

    def _name_the_rest(self) -> None:
        taken = {value.name for value in self._named}
        count = 0
        for node in self.graph.nodes:
            for value in (*node.inputs, *node.outputs):
                if value in self._named:
                    continue
                base = f"{node.origin}/{node.op.name}" if value in node.outputs else f"{node.origin}/constant"
                name = value.name or base
                while name in taken:
                    count += 1
                    name = f"{base}_{count}"
                taken.add(name)
                self.name(value, name)


def _check_shape(shape: tuple[Dim, ...], what: str) -> None:
    for size in shape:
        if isinstance(size, int) and size < 0:
            raise ModelError(f"{what}: the result would have a negative size: {[str(dim) for dim in shape]}")
        if isinstance(size, Sym) and complexity(size) > MAX_TERMS:
            raise ModelError(f"{what}: a size has become too complicated to follow; give the inputs fixed shapes")
    if prod(size for size in shape if isinstance(size, int)) > _MAX_SIZE:
        raise ModelError(f"{what}: the result would have {[str(dim) for dim in shape]} elements")


def _equal_dims(op: ops.Op, inputs: Sequence[Value]) -> Iterator[tuple[Dim, Dim]]:
    """Pairs of sizes that must be equal for `op` to make sense (where neither is 1)."""
    shapes: list[tuple[Dim, ...]] = [value.shape for value in inputs]
    if isinstance(op, ops.Gemm):
        yield shapes[0][-1], shapes[1][-2]
        shapes = [shape[:-2] for shape in shapes[:2]]
    elif isinstance(op, ops.Concat):
        shapes = [(*shape[: op.axis], 1, *shape[op.axis + 1 :]) for shape in shapes]
    elif isinstance(op, ops.Attention):
        yield shapes[1][-2], shapes[2][-2]
        shapes = [shape[:1] for shape in shapes[:3]]
    elif isinstance(op, ops.Pointwise):
        shapes = [operand_shape(i, inputs, op.gathers) for i in ex.arguments(*op.stores)]
    else:
        return
    for first, second in pairwise(shapes):
        yield from ((a, b) for a, b in zip(reversed(first), reversed(second), strict=False) if 1 not in (a, b))
