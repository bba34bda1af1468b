"""LSTM, GRU and RNN: the inputs of all steps in one matrix product, what depends on the step before in a `Recurrent`.

Sequences of different lengths (PyTorch's packed ones) run to the longest: behind its end the gates of a sequence keep
its state. Variants that hardly any exporter writes (peepholes, clipping, other activations) are `Opaque`.
"""

from __future__ import annotations

import numpy as np

from engine.frontend import foreign
from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.indexing import lookup
from engine.frontend.operators.linalg import matmul, swap_last
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import concat, drop_axis, take
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
    starts = _starts_anywhere(node, lengths, initial_h, initial_c)
    if not usual or not starts or not _is_usual(node, x, r, bias):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h, initial_c, peephole])
    state, cell = (_state(node, value, x, r) for value in (initial_h, initial_c))
    return _recurrent(node, Cell.LSTM, (x, w, r), bias, lengths, state, cell)


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
    if not usual or not _is_usual(node, x, r, bias):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h])
    hidden = r.shape[2]
    zeros = np.zeros((int(str(r.shape[0])), int(str(hidden))), np.float32)
    recurrent = zeros if bias is None or bias.data is None else _split(bias.data, 3)[:, 1, 2]
    state = _state(node, initial_h, x, r)
    return _recurrent(node, Cell.GRU, (x, w, r), bias, lengths, state, node.constant(recurrent))


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
    usual = (relu or _activations(node, "tanh")) and _starts_anywhere(node, lengths, initial_h)
    if not usual or not _is_usual(node, x, r, bias):
        return foreign.opaque(node, [x, w, r, bias, lengths, initial_h])
    cell = Cell.RNN_RELU if relu else Cell.RNN_TANH
    return _recurrent(node, cell, (x, w, r), bias, lengths, _state(node, initial_h, x, r))


def _activations(node: OnnxNode, *names: str) -> bool:
    """Whether every direction has these activations."""
    if not node.has("activations"):
        return True
    given = [name.decode().lower() for name in node.attributes["activations"].strings]
    return bool(given) and all(name == names[i % len(names)] for i, name in enumerate(given))


def _starts_anywhere(node: OnnxNode, lengths: Value | None, *initial: Value | None) -> bool:
    """Whether a sequence may begin behind steps that are not its own, as backwards a shorter one does: from zeros."""
    forward = node.text("direction", "forward") == "forward"
    return lengths is None or forward or all(state is None for state in initial)


def _is_usual(node: OnnxNode, x: Value, r: Value, bias: Value | None) -> bool:
    constant = r.data is not None and (bias is None or bias.data is not None)
    plain = not node.has("clip") and not node.integer("layout", 0)
    return constant and plain and x.dtype is DType.F32 and x.rank == r.rank == 3


def _state(node: OnnxNode, value: Value | None, x: Value, r: Value) -> Value:
    zero = node.constant(np.zeros((1, 1, 1), np.float32))
    return value if value is not None else node.expand(zero, (r.shape[0], x.shape[1], r.shape[2]))


def _split(bias: np.ndarray, gates: int) -> np.ndarray:
    """[directions, input or recurrent, gates, hidden]"""
    return bias.reshape(bias.shape[0], 2, gates, -1)


def _recurrent(
    node: OnnxNode,
    cell: Cell,
    operands: tuple[Value, Value, Value],
    bias: Value | None,
    lengths: Value | None,
    *states: Value,
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
    steps = node.transpose(split, (0, 2, 1, 3))
    op = ops.Recurrent(cell, backwards)
    if lengths is None:
        return node.add_all(op, steps, r, *states)
    own = _own_steps(node, steps, lengths)
    kept = node.constant(np.repeat(np.array(_KEEPING[cell], np.float32), int(str(r.shape[2]))))
    every, last, *cells = node.add_all(
        op, node.pointwise(lambda inside, gate, keep: f.where(inside, gate, keep), own, steps, kept), r, *states
    )
    every = node.pointwise(lambda inside, state: f.where(inside, state, 0.0), own, every)
    return [every, _at_the_end(node, every, last, lengths, backwards), *cells]


_FAR = 1e4  # where a sigmoid is 0 or 1, and what the recurrent weights add does not matter
_KEEPING = {
    Cell.LSTM: (-_FAR, -_FAR, _FAR, 0.0),  # nothing in, nothing out, nothing forgotten
    Cell.GRU: (_FAR, 0.0, 0.0),
    Cell.RNN_TANH: (0.0,),
    Cell.RNN_RELU: (0.0,),
}
"""Gates of a step behind the end, in front of the first where the steps go backwards: those of an LSTM keep its cell
and make its state 0, those of a GRU keep its state, a plain cell stays at 0. What that computes behind is not looked
at."""


def _own_steps(node: OnnxNode, steps: Value, lengths: Value) -> Value:
    """bool [steps, 1, batch, 1]: whether a step belongs to the sequence."""
    count, _, batch, _ = steps.shape
    length = node.reshape(node.cast(lengths, DType.I64), (1, 1, batch, 1))
    return node.pointwise(lambda t, n: f.less(t, n), positions(node, count, 0, 4), length)


def _at_the_end(node: OnnxNode, every: Value, last: Value, lengths: Value, backwards: int) -> Value:
    """The states after the last step: forwards that of a sequence's own last step, backwards that of the first one."""
    count, directions, batch, hidden = every.shape
    if backwards == 0:
        return last
    line = positions(node, batch)
    size = node.builder.sizes([batch], ())
    index = node.pointwise(lambda n, b, s: (n.cast(DType.I64) - 1) * s + b, lengths, line, size)
    forward = drop_axis(node, every, 1, 0)
    found = node.reshape(lookup(node, node.reshape(forward, (count * batch, hidden)), index), (1, batch, hidden))
    return found if directions == 1 else concat(node, [found, take(node, last, 0, 1, 1)], 0)
