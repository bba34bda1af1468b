"""Graph + sizes → Plan. Resolves views to strides, places results, inserts the copies that a kernel's needs force,
and lays out the memory. Called by `engine.model` once per set of sizes; must stay cheap (milliseconds).

Results are written where they are needed: a graph output straight into the caller's array, an operand of a Concat
straight into its slice, also through transposes and reshapes in between (`_Destinations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from engine.errors import EngineError, ShapeError
from engine.ir import expr as ex
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Concat, Op, Opaque, Pointwise, Reshape, ShapeTensor, Transpose, Undefined, View
from engine.ir.regroup import is_view, reshaped_order
from engine.plan.concrete import concrete_op, concrete_shape
from engine.plan.memory import Lifetime, assign_offsets
from engine.plan.plan import Access, Capabilities, Plan, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.plan.views import apply_view, reshape

MAX_ELEMENTS = 1 << 40
"""Elements of any tensor: beyond all memory there is. What fits no device below that is an OutOfMemory of the
target."""
MAX_REPEATED_ELEMENTS = 1 << 33
"""Elements of an operand that takes little memory because it repeats itself (a broadcast). A hostile model can make a
device walk over such a tensor for hours without storing anything."""
MAX_SIZE_ELEMENTS = 1 << 26
"""Elements of a tensor of sizes, which is computed on the host when the plan is built."""


class Constants:
    """The buffers of a graph's constants: one per array, shared by all plans of the graph."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Value, Buffer]] = {}

    def buffer(self, value: Value) -> Buffer:
        found = self._buffers.get(id(value))
        if found is None:
            assert value.data is not None
            data = np.asarray(value.data, order="C")
            found = (value, Buffer(value.name, BufferKind.CONSTANT, data.nbytes, data))
            self._buffers[id(value)] = found
        return found[1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for _, buffer in self._buffers.values())


def build(graph: Graph, sizes: Mapping[str, int], target: Capabilities, constants: Constants) -> Plan:
    """The plan of `graph` where every symbol has the size given.

    Raises ShapeError where the sizes contradict the graph (naming the node) and UnsupportedOp where the target lacks a
    kernel.
    """
    return _Builder(graph, dict(sizes), target, constants).run()


@dataclass
class _Builder:
    graph: Graph
    sizes: dict[str, int]
    target: Capabilities
    constants: Constants
    tensors: dict[Value, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    copied: dict[tuple[Tensor, Requirement], Tensor] = field(default_factory=dict)

    def run(self) -> Plan:
        inputs = {value.name: self._input(value) for value in self.graph.inputs}
        self.outputs = self._output_tensors()
        self.destinations = self._find_destinations()
        for node in self.graph.nodes:
            try:
                self._node(node)
            except EngineError as error:
                raise type(error)(f"node {node.origin!r} ({node.op.name}): {error}") from error
        for value, tensor in zip(self.graph.outputs, self.outputs.values(), strict=True):
            self._copy_unless_there(self._tensor(value), tensor, f"{value.name}.output")
        buffers = self._buffers()
        arena, total = assign_offsets(self._lifetimes())
        return Plan(self.sizes, tuple(self.steps), inputs, self.outputs, buffers, arena, total)

    # Inputs, outputs, constants

    def _input(self, value: Value) -> Tensor:
        shape = concrete_shape(value.shape, self.sizes)
        try:
            _check_elements(shape)
        except ShapeError as error:
            raise ShapeError(f"input {value.name!r}: {error}") from None
        tensor = self._dense(value.name, BufferKind.INPUT, value, shape)
        self.tensors[value] = tensor
        return tensor

    def _output_tensors(self) -> dict[str, Tensor]:
        return {
            name: self._dense(name, BufferKind.OUTPUT, value, concrete_shape(value.shape, self.sizes))
            for name, value in zip(self.graph.output_names, self.graph.outputs, strict=True)
        }

    def _dense(
        self, name: str, kind: BufferKind, value: Value, shape: tuple[int, ...], order: tuple[int, ...] | None = None
    ) -> Tensor:
        nbytes = prod(shape) * value.dtype.itemsize
        return Tensor(Buffer(name, kind, nbytes), value.dtype, shape, row_major(shape, order))

    def _tensor(self, value: Value) -> Tensor:
        found = self.tensors.get(value)
        if found is None:
            buffer = self.constants.buffer(value)
            assert buffer.data is not None
            found = Tensor(buffer, value.dtype, buffer.data.shape, row_major(buffer.data.shape))
            self.tensors[value] = found
        return found

    # Where results go

    def _find_destinations(self) -> dict[Value, Tensor]:
        """Values that can be written straight to a graph output or to a slice of a concatenation."""
        producers = self.graph.producers()
        destinations: dict[Value, Tensor] = {}
        for value, tensor in zip(self.graph.outputs, self.outputs.values(), strict=True):
            self._push_destination(value, tensor, producers, destinations)
        for node in reversed(self.graph.nodes):
            if not isinstance(node.op, Concat):
                continue
            shape = concrete_shape(node.output.shape, self.sizes)
            whole = destinations.get(node.output) or _joined(node.op, [destinations.get(v) for v in node.inputs])
            if whole is None:
                whole = self._dense(node.output.name, BufferKind.ARENA, node.output, shape, node.output.order)
            destinations[node.output] = whole
            for value, part in zip(node.inputs, concat_slices(node.op, whole, self._shapes(node)), strict=True):
                self._push_destination(value, part, producers, destinations)
        return destinations

    def _push_destination(
        self, value: Value, tensor: Tensor, producers: Mapping[Value, Node], destinations: dict[Value, Tensor]
    ) -> None:
        """Record where `value` may be written, back through views that can be undone. First come, first served."""
        while value not in destinations:
            node = producers.get(value)
            if node is None:
                return
            destinations[value] = tensor
            match node.op:
                case Transpose(perm):
                    undone = apply_view(Transpose(tuple(int(axis) for axis in np.argsort(perm))), tensor)
                case Reshape():
                    undone = reshape(tensor, concrete_shape(node.inputs[0].shape, self.sizes))
                case _:
                    return
            if undone is None:
                return
            value, tensor = node.inputs[0], undone

    def _shapes(self, node: Node) -> list[tuple[int, ...]]:
        return [concrete_shape(value.shape, self.sizes) for value in node.inputs]

    def _place(self, value: Value, shape: tuple[int, ...], need: Requirement) -> Tensor:
        """The tensor a step writes `value` to: its destination where the kernel can write there, else a new buffer."""
        there = self.destinations.get(value)
        if there is not None and there.shape == shape and _satisfied(there, need):
            return there
        order = value.order
        if not _order_satisfies(order, need, len(shape)):
            order = need.order or None
        return self._dense(value.name, BufferKind.ARENA, value, shape, order)

    # Nodes

    def _node(self, node: Node) -> None:
        op = concrete_op(node.op, self.sizes)
        match op:
            case ShapeTensor():
                self.tensors[node.output] = _shape_tensor(node.output.name, op)
            case Undefined():
                self.tensors[node.output] = self._place(node.output, _concrete(op.shape), Requirement())
            case View():
                self.tensors[node.output] = self._view(node, op)
            case Concat():
                self._concat(node, op)
            case _:
                self._step(node, op)

    def _view(self, node: Node, op: View) -> Tensor:
        operand = self._tensor(node.inputs[0])
        op.infer((operand,))
        result = apply_view(op, operand)
        if result is None:
            packed = self._copy(operand, f"{node.origin}.copy", Requirement(order=self._packed(node, operand)))
            result = apply_view(op, packed)
            assert result is not None
        return result

    def _packed(self, node: Node, operand: Tensor) -> tuple[int, ...]:
        """The order in which to copy `operand` so that its reshape is a view, in the order the graph gives it."""
        shape = concrete_shape(node.output.shape, self.sizes)
        order = node.output.order
        packed = reshaped_order(shape, operand.shape, order) if order is not None else None
        return packed if packed is not None and is_view(operand.shape, shape, packed) else ()

    def _concat(self, node: Node, op: Concat) -> None:
        parts = [self._tensor(value) for value in node.inputs]
        ((_, shape),) = op.infer(parts)
        whole = self.destinations[node.output]
        if whole.shape != shape:
            raise ShapeError(f"the parts make {list(shape)}, the model says {list(whole.shape)}")
        self.tensors[node.output] = whole
        slices = concat_slices(op, whole, [part.shape for part in parts])
        for part, destination in zip(parts, slices, strict=True):
            self._copy_unless_there(part, destination, f"{node.origin}.part")

    def _step(self, node: Node, op: Op) -> None:
        inputs = tuple(self._tensor(value) for value in node.inputs)
        types = op.infer(inputs)
        for tensor in inputs:
            repeats = tensor.nbytes < tensor.elements * tensor.dtype.itemsize
            _check_elements(tensor.shape, MAX_REPEATED_ELEMENTS if repeats else MAX_ELEMENTS)
        for _, shape in types:
            _check_elements(_concrete(shape))
        if isinstance(op, Opaque):
            dense = Requirement(Access.DENSE)
            input_needs: tuple[Requirement, ...] = (dense,) * len(inputs)
            output_needs: tuple[Requirement, ...] = (dense,) * len(types)
        else:
            input_needs, output_needs = self.target.requirements(op, inputs)
        inputs = tuple(
            tensor if _satisfied(tensor, need) else self._laid_out(tensor, f"{node.origin}.layout", need)
            for tensor, need in zip(inputs, input_needs, strict=True)
        )
        shapes = [_concrete(shape) for _, shape in types]
        outputs = tuple(
            self._place(value, shape, need)
            for value, shape, need in zip(node.outputs, shapes, output_needs, strict=True)
        )
        for value, tensor in zip(node.outputs, outputs, strict=True):
            self.tensors[value] = tensor
        self._emit(node.origin or op.name, op, inputs, outputs)

    def _emit(self, name: str, op: Op, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        if not any(tensor.elements for tensor in outputs):
            return
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        unique = name if not count else f"{name}#{count}"
        self.steps.append(Step(unique, op, inputs, outputs, op.cost(inputs, outputs)))

    # Copies

    def _laid_out(self, tensor: Tensor, name: str, need: Requirement) -> Tensor:
        """A copy that every kernel with this need reads."""
        if (tensor, need) not in self.copied:
            self.copied[tensor, need] = self._copy(tensor, name, need)
        return self.copied[tensor, need]

    def _copy(self, tensor: Tensor, name: str, need: Requirement | None = None) -> Tensor:
        order = need.order if need is not None and need.order else None
        nbytes = tensor.elements * tensor.dtype.itemsize
        result = Tensor(
            Buffer(name, BufferKind.ARENA, nbytes), tensor.dtype, tensor.shape, row_major(tensor.shape, order)
        )
        self._emit(name, Pointwise((ex.Arg(0, tensor.dtype),)), (tensor,), (result,))
        return result

    def _copy_unless_there(self, source: Tensor, destination: Tensor, name: str) -> None:
        if source.shape != destination.shape:
            raise ShapeError(f"{name}: shape {list(source.shape)} where the model says {list(destination.shape)}")
        if not source.is_at(destination):
            self._emit(name, Pointwise((ex.Arg(0, source.dtype),)), (source,), (destination,))

    # Memory

    def _buffers(self) -> tuple[Buffer, ...]:
        tensors = (tensor for step in self.steps for tensor in (*step.inputs, *step.outputs))
        return tuple(dict.fromkeys(tensor.buffer for tensor in tensors))

    def _lifetimes(self) -> list[Lifetime]:
        spans: dict[Buffer, tuple[int, int]] = {}
        for index, step in enumerate(self.steps):
            for tensor in (*step.inputs, *step.outputs):
                if tensor.buffer.kind is BufferKind.ARENA:
                    first, _ = spans.get(tensor.buffer, (index, index))
                    spans[tensor.buffer] = (first, index)
        return [Lifetime(buffer, first, last) for buffer, (first, last) in spans.items()]


def concat_slices(op: Concat, whole: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The windows of `whole` where parts of the given shapes belong."""
    slices = []
    start = 0
    for shape in shapes:
        offset = whole.offset + start * whole.strides[op.axis]
        slices.append(Tensor(whole.buffer, whole.dtype, shape, whole.strides, offset))
        start += shape[op.axis]
    return slices


def _joined(op: Concat, parts: list[Tensor | None]) -> Tensor | None:
    """The window that the parts make where they already lie side by side: one later concatenation, which has them all
    (as in a DenseNet, where each repeats the last with one more), serves for both."""
    first = parts[0]
    if first is None:
        return None
    size = 0
    for part in parts:
        if part is None or part.buffer is not first.buffer or part.strides != first.strides:
            return None
        if part.offset != first.offset + size * first.strides[op.axis]:
            return None
        size += part.shape[op.axis]
    return replace(first, shape=(*first.shape[: op.axis], size, *first.shape[op.axis + 1 :]))


def _check_elements(shape: tuple[int, ...], limit: int = MAX_ELEMENTS) -> None:
    elements = prod(shape)
    if elements > limit:
        raise ShapeError(
            f"a tensor of shape {list(shape)} has {elements:,} elements, the limit is {limit:,}; use smaller inputs"
        )


def _shape_tensor(name: str, op: ShapeTensor) -> Tensor:
    shape = _concrete(op.shape)
    _check_elements(shape, MAX_SIZE_ELEMENTS)
    values = np.arange(shape[0]) if op.values is None else np.array(op.values, np.int64)
    data = values.astype(op.dtype.numpy).reshape(shape)
    return Tensor(Buffer(name, BufferKind.PLAN, data.nbytes, data), op.dtype, shape, row_major(shape))


def _satisfied(tensor: Tensor, need: Requirement) -> bool:
    order = need.order or tuple(range(len(tensor.shape)))
    match need.access:
        case Access.STRIDED:
            return True
        case Access.DENSE:
            return tensor.is_contiguous_in(order)
        case Access.INNER:
            return not order or tensor.shape[order[-1]] <= 1 or tensor.strides[order[-1]] == 1


def _order_satisfies(order: tuple[int, ...] | None, need: Requirement, rank: int) -> bool:
    if need.access is Access.STRIDED:
        return True
    rows = tuple(range(rank))
    present, wanted = order or rows, need.order or rows
    return present == wanted if need.access is Access.DENSE else present[-1:] == wanted[-1:]


def _concrete(shape: tuple[object, ...]) -> tuple[int, ...]:
    assert all(isinstance(dim, int) for dim in shape), f"{shape} is not concrete"
    return shape  # type: ignore[return-value]
