"""LSTM, GRU and RNN: the inputs of all steps in one matrix product, what depends on the step before in a `Recurrent`.

Variants that hardly any exporter writes (peepholes, clipping, other activations, lengths for each row) are `Opaque`.
"""

from __future__ import annotations

import numpy as np

from engine.frontend import foreign
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.linalg import matmul, swap_last
from engine.frontend.registry import Results, operator
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops import Cell


@operator("LSTM")
def LSTM(
    node: OnnxNode,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
    initial_c: Value | None = None,
    peephole: Value | None = None,
) -> Results:
    usual = _activations(node, "sigmoid", "tanh", "tanh") and not node.integer("input_forget", 0) and peephole is None
    if not usual or not _is_usual(node, x, r, bias, lengths):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h, initial_c, peephole])
    state, cell = (_state(node, value, x, r) for value in (initial_h, initial_c))
    return _recurrent(node, Cell.LSTM, (x, w, r), bias, state, cell)


@operator("GRU")
def GRU(
    node: OnnxNode,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
) -> Results:
    # Without `linear_before_reset` the candidate's product has to wait for the reset gate.
    usual = _activations(node, "sigmoid", "tanh") and bool(node.integer("linear_before_reset", 0))
    if not usual or not _is_usual(node, x, r, bias, lengths):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h])
    hidden = r.shape[2]
    zeros = np.zeros((int(str(r.shape[0])), int(str(hidden))), np.float32)
    recurrent = zeros if bias is None or bias.data is None else _split(bias.data, 3)[:, 1, 2]
    return _recurrent(node, Cell.GRU, (x, w, r), bias, _state(node, initial_h, x, r), node.constant(recurrent))


@operator("RNN")
def RNN(
    node: OnnxNode,
    x: Value,
    w: Value,
    r: Value,
    bias: Value | None = None,
    lengths: Value | None = None,
    initial_h: Value | None = None,
) -> Results:
    relu = _activations(node, "relu") and node.has("activations")
    if not (relu or _activations(node, "tanh")) or not _is_usual(node, x, r, bias, lengths):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h])
    return _recurrent(node, Cell.RNN_RELU if relu else Cell.RNN_TANH, (x, w, r), bias, _state(node, initial_h, x, r))


def _activations(node: OnnxNode, *names: str) -> bool:
    """Whether every direction has these activations."""
    if not node.has("activations"):
        return True
    given = [name.decode().lower() for name in node.attributes["activations"].strings]
    return bool(given) and all(name == names[i % len(names)] for i, name in enumerate(given))


def _is_usual(node: OnnxNode, x: Value, r: Value, bias: Value | None, lengths: Value | None) -> bool:
    constant = r.data is not None and (bias is None or bias.data is not None)
    plain = lengths is None and not node.has("clip") and not node.integer("layout", 0)
    return constant and plain and x.dtype is DType.F32 and x.rank == r.rank == 3


def _state(node: OnnxNode, value: Value | None, x: Value, r: Value) -> Value:
    zero = node.constant(np.zeros((1, 1, 1), np.float32))
    return value if value is not None else node.expand(zero, (r.shape[0], x.shape[1], r.shape[2]))


def _split(bias: np.ndarray, gates: int) -> np.ndarray:
    """[directions, input or recurrent, gates, hidden]"""
    return bias.reshape(bias.shape[0], 2, gates, -1)


def _recurrent(
    node: OnnxNode, cell: Cell, operands: tuple[Value, Value, Value], bias: Value | None, *states: Value
) -> Results:
    x, w, r = operands
    directions, width, _ = r.shape
    if w.rank != 3 or w.shape[:2] != r.shape[:2]:
        raise node.invalid(f"weights of shapes {list(w.shape)} and {list(r.shape)}")
    flat = node.reshape(w, (directions * width, w.shape[2]))
    gates = matmul(node, x, swap_last(node, flat))
    if bias is not None and bias.data is not None:
        parts = _split(bias.data, cell.gates)
        total = parts.sum(1)
        if cell is Cell.GRU:
            total[:, 2] = parts[:, 0, 2]
        gates = node.pointwise(lambda a, b: a + b, gates, node.constant(total.reshape(-1)))
    split = node.reshape(gates, (*x.shape[:2], directions, width))
    direction = node.choice("direction", "forward", "reverse", "bidirectional")
    backwards = {"forward": -1, "reverse": 0, "bidirectional": 1}[direction]
    return node.add_all(ops.Recurrent(cell, backwards), node.transpose(split, (0, 2, 1, 3)), r, *states)
