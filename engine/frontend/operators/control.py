"""Control flow, resolved while the model is read: branches whose condition is known, loops of a known small count."""

from __future__ import annotations

from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.slicing import concat, drop_axis
from engine.frontend.registry import operator
from engine.ir.graph import Value

_MAX_TRIPS = 256


@operator("If")
def If(node: OnnxNode, condition: Value) -> list[Value]:
    known = node.known(condition)
    if known is not None:
        return node.inline("then_branch" if node.scalar(condition, "condition") else "else_branch", (), "")
    # Both branches are free of effects, so where they agree in shape the result is a choice between two tensors.
    chosen, other = node.inline("then_branch", (), "then/"), node.inline("else_branch", (), "else/")
    for a, b in zip(chosen, other, strict=True):
        if a.shape != b.shape or a.dtype is not b.dtype:
            raise node.unsupported("a condition known only at run time, with branches of different shapes,")
    switch = node.reshape(condition, ())
    return [node.pointwise(f.where, switch, a, b) for a, b in zip(chosen, other, strict=True)]


@operator("Loop")
def Loop(node: OnnxNode, trips: Value | None = None, condition: Value | None = None, *carried: Value) -> list[Value]:
    count = node.static_ints(trips, "a trip count")[0] if trips is not None else _MAX_TRIPS + 1
    going = condition if condition is not None else node.constant(True)
    state = list(carried)
    scanned: list[list[Value]] = []
    trip = 0
    while trip < count:
        if not node.scalar(going, "a loop condition"):
            break
        if trip == _MAX_TRIPS:
            raise node.unsupported(f"a loop of more than {_MAX_TRIPS} trips")
        results = node.inline("body", (node.constant(trip), going, *state), f"{trip}/")
        going, state = results[0], results[1 : 1 + len(carried)]
        scanned.append(results[1 + len(carried) :])
        trip += 1
    if not scanned and len(node.outputs) > len(carried):
        raise node.unsupported("a loop without trips that collects results")
    stacked = [
        concat(node, [node.reshape(value, (1, *value.shape)) for value in column], 0)
        for column in zip(*scanned, strict=True)
    ]
    return [*state, *stacked]


@operator("Scan", since=9)
def Scan(node: OnnxNode, *values: Value) -> list[Value]:
    count = node.integer("num_scan_inputs")
    carried = len(values) - count
    if count < 1 or carried < 0:
        raise node.invalid(f"{count} scanned inputs of {len(values)}")
    collected = max(0, len(node.outputs) - carried)
    scanned = values[carried:]
    axes = [node.axis(a, v.rank) for a, v in zip(node.integers("scan_input_axes", (0,) * count), scanned, strict=True)]
    backwards = node.integers("scan_input_directions", (0,) * count)
    length = scanned[0].shape[axes[0]]
    if not isinstance(length, int) or not 1 <= length <= _MAX_TRIPS:
        raise node.unsupported(f"a scan over {length} positions")
    state = list(values[:carried])
    collection: list[list[Value]] = []
    for trip in range(length):
        parts = [
            drop_axis(node, value, axis, length - 1 - trip if reverse else trip)
            for value, axis, reverse in zip(scanned, axes, backwards, strict=True)
        ]
        results = node.inline("body", (*state, *parts), f"{trip}/")
        state = results[:carried]
        collection.append(results[carried : carried + collected])
    out_axes = node.integers("scan_output_axes", (0,) * collected)
    reversed_out = node.integers("scan_output_directions", (0,) * collected)
    stacked = []
    for column, given, reverse in zip(zip(*collection, strict=True), out_axes, reversed_out, strict=True):
        axis = node.axis(given, column[0].rank + 1)
        rows = [node.reshape(value, (*value.shape[:axis], 1, *value.shape[axis:])) for value in column]
        stacked.append(concat(node, rows[::-1] if reverse else rows, axis))
    return [*state, *stacked]
