"""Recurrent networks: what depends on the step before. The products with the inputs of all steps are a `Gemm` ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from engine.errors import ShapeError
from engine.ir.dim import Dim
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes


class Cell(Enum):
    """h is the state before a step, x its inputs' products for each gate (bias included), r the recurrent weights."""

    RNN_TANH = "rnn_tanh"  # h' = tanh(x + r h)
    RNN_RELU = "rnn_relu"  # h' = max(x + r h, 0)
    GRU = "gru"  # gates z, u, n: h' = (1 − σ(z)) tanh(xₙ + σ(u) (rₙ h + b)) + σ(z) h
    LSTM = "lstm"  # gates i, o, f, g: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c')

    @property
    def gates(self) -> int:
        return {Cell.GRU: 3, Cell.LSTM: 4}.get(self, 1)


@dataclass(frozen=True)
class Recurrent(Op):
    """`x[steps, directions, batch, gates · hidden]`, `r[directions, gates · hidden, hidden]` and the first state
    `h[directions, batch, hidden]`, then for LSTM the first `c` (like h), for GRU `b[directions, hidden]`.

    Results: the state after every step [steps, directions, batch, hidden], after the last, and for LSTM the last c.
    The direction `reversed` (−1: none) takes the steps from the last to the first. Gates are in ONNX's order.
    """

    cell: Cell
    reversed: int = -1

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        x, r, h = (t.shape for t in inputs[:3])
        hidden: Dim = r[-1]
        if len(x) != 4 or x[-1] != hidden * self.cell.gates or r[-2] != x[-1] or h[-1] != hidden:
            raise ShapeError(f"Recurrent: inputs {list(x)}, weights {list(r)}, state {list(h)}")
        steps, directions, batch, _ = x
        state = (inputs[0].dtype, (directions, batch, hidden))
        every = (inputs[0].dtype, (steps, directions, batch, hidden))
        return (every, state, state) if self.cell is Cell.LSTM else (every, state)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        hidden = outputs[0].shape[-1]
        # Per unit and step: the products; two additions, a product and an activation or so for each gate.
        return outputs[0].elements * self.cell.gates * (2 * hidden + 4)
