"""Sequences of tensors, which exist only while the model is read: a split that is indexed or joined again."""

from __future__ import annotations

from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.slicing import concat, split_at
from engine.frontend.registry import operator
from engine.ir.dim import Dim
from engine.ir.graph import Value


@operator("OptionalGetElement")
def OptionalGetElement(node: OnnxNode, value: Value) -> Value:
    """An optional that there is."""
    return value


@operator("SequenceConstruct")
def SequenceConstruct(node: OnnxNode, *values: Value) -> Value:
    return node.builder.sequence(values)


@operator("SequenceEmpty")
def SequenceEmpty(node: OnnxNode) -> Value:
    return node.builder.sequence(())


@operator("SequenceAt")
def SequenceAt(node: OnnxNode, sequence: Value, position: Value) -> Value:
    elements = node.elements(sequence)
    return elements[node.axis(int(node.scalar(position, "a position")), len(elements))]


@operator("SequenceLength")
def SequenceLength(node: OnnxNode, sequence: Value) -> Value:
    return node.constant(len(node.elements(sequence)))


@operator("SequenceInsert")
def SequenceInsert(node: OnnxNode, sequence: Value, value: Value, position: Value | None = None) -> Value:
    elements = list(node.elements(sequence))
    at = int(node.scalar(position, "a position")) if position is not None else len(elements)
    elements.insert(at, value)
    return node.builder.sequence(elements)


@operator("SequenceErase")
def SequenceErase(node: OnnxNode, sequence: Value, position: Value | None = None) -> Value:
    elements = list(node.elements(sequence))
    at = int(node.scalar(position, "a position")) if position is not None else -1
    del elements[node.axis(at, len(elements))]
    return node.builder.sequence(elements)


@operator("ConcatFromSequence")
def ConcatFromSequence(node: OnnxNode, sequence: Value) -> Value:
    elements = list(node.elements(sequence))
    if not elements:
        raise node.invalid("an empty sequence")
    axis = node.integer("axis")
    if node.integer("new_axis", 0):
        at = node.axis(axis, elements[0].rank + 1)
        elements = [node.reshape(value, (*value.shape[:at], 1, *value.shape[at:])) for value in elements]
    else:
        at = node.axis(axis, elements[0].rank)
    return concat(node, elements, at)


@operator("SplitToSequence")
def SplitToSequence(node: OnnxNode, x: Value, split: Value | None = None) -> Value:
    axis = node.axis(node.integer("axis", 0), x.rank)
    size = x.shape[axis]
    parts: list[Dim]
    if split is not None and split.rank == 1:
        parts = node.dims(split, "split")
    elif not isinstance(size, int):
        raise node.unsupported(f"splitting an axis of unknown size ({size})")
    else:
        chunk = node.static_ints(split, "split")[0] if split is not None else 1
        if chunk < 1:
            raise node.invalid(f"parts of {chunk}")
        parts = [min(chunk, size - start) for start in range(0, size, chunk)]
    pieces = split_at(node, x, axis, parts)
    if split is None and not node.integer("keepdims", 1):
        pieces = [node.reshape(piece, (*piece.shape[:axis], *piece.shape[axis + 1 :])) for piece in pieces]
    return node.builder.sequence(pieces)
