"""Recurrent networks (recurrent.cuh): one launch for all steps of a small one, a launch for every step of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Cell, Op, Recurrent
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import pointwise
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    I64s,
    Launch,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
    workspace,
)
from engine.targets.cuda.spaces import operand

_FLOATS = (DType.F16, DType.BF16, DType.F32)
_ROWS = 4  # at most: with four gates that is sixteen sums a lane
_CHUNKS = 4  # of 16 bytes a lane and gate, at most: 64 registers
_SEQUENCE_BYTES = 160 << 10
"""Weights of a direction that a multiprocessor can read again in every step: most of them from its L1 cache (192 KiB on
sm_80, 256 on sm_90), in less time than it takes to launch the next step."""
_SEQUENCE_THREADS, _STEP_THREADS = 512, 256


@dataclass(frozen=True)
class _Shape:
    """How a kernel divides the work: `group` lanes to a unit, `rows` sequences at a time, `padded` states to a row."""

    group: int
    rows: int
    chunks: int
    padded: int


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """The recurrent weights lie row by row; all other strides are free."""
    assert isinstance(op, Recurrent)
    wrong = [tensor.dtype.value for tensor in inputs if tensor.dtype not in _FLOATS]
    if wrong:
        raise UnsupportedOp(f"Recurrent on {wrong[0]}: the CUDA kernel takes f16, bf16 and f32; cast the operands")
    needs = [Requirement() for _ in inputs]
    needs[1] = Requirement(Access.INNER, (0, 1, 2))
    return tuple(needs), (Requirement(),) * (3 if op.cell is Cell.LSTM else 2)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Recurrent)
    steps, directions, batch, hidden = step.outputs[0].shape
    if not steps:
        return _final_states(step, context)
    weights = op.cell.gates * hidden * hidden * step.inputs[1].dtype.itemsize
    sequence = weights <= _SEQUENCE_BYTES
    shape = _shape(op.cell, batch, hidden, step.inputs[1].dtype, context)
    arguments = _arguments(step, op, shape)
    if sequence:
        grid, threads = (1, ceildiv(batch, shape.rows), directions), _SEQUENCE_THREADS
        arguments |= {"step": 0, "end": steps}
        return [_launch(step, op, shape, arguments, True, grid, threads, 3 * shape.rows * shape.padded * 4)]
    # Two turns of states in memory, and the cells.
    now = (directions, batch, hidden)
    memory = workspace(3 * prod(now) * 4)
    states = Tensor(memory, DType.F32, now, row_major(now))
    cells = replace(states, offset=2 * prod(now))
    sources = [step.inputs[2], *([step.inputs[3]] if op.cell is Cell.LSTM else [])]
    reads = {i: operand(source, 3) for i, source in enumerate(sources)}
    stores = tuple(ex.cast(ex.Arg(i, source.dtype), DType.F32) for i, source in enumerate(sources))
    launches = pointwise.launches(stores, reads, (states, cells)[: len(sources)], context, "recurrent")
    blocks = ceildiv(hidden, _STEP_THREADS // shape.group)
    turns = max(1, ceildiv(2 * context.multiprocessors, blocks * directions))  # the others are taken in a loop
    grid = (blocks, min(ceildiv(batch, shape.rows), turns), directions)
    arguments |= {"states": pointer_to(states), "cells": pointer_to(cells), "step": 0, "end": 1}
    one = _launch(step, op, shape, arguments, False, grid, _STEP_THREADS, shape.rows * shape.padded * 4)
    for i in range(steps):
        turn = {"step": i, "end": i + 1}
        launches.append(replace(one, arguments=tuple((name, turn.get(name, given)) for name, given in one.arguments)))
    return launches


def _shape(cell: Cell, batch: int, hidden: int, weights: DType, context: Context) -> _Shape:
    vector = 16 // weights.itemsize
    lanes = ceildiv(hidden, vector)
    group = min(32, max(8, 1 << (lanes - 1).bit_length()))
    chunks = min(_CHUNKS, 1 << (ceildiv(lanes, group) - 1).bit_length())
    slots = 4 if cell.gates > 1 else 1
    padded = lanes * vector
    rows = min(_ROWS, group // slots, 1 << (batch - 1).bit_length())
    while rows > 1 and rows * padded * 4 > context.architecture.shared_bytes:
        rows //= 2
    if rows * padded * 4 > context.architecture.shared_bytes:
        raise UnsupportedOp(f"Recurrent with {hidden} units: their states do not fit a multiprocessor")
    return _Shape(group, rows, chunks, padded)


def _arguments(step: Step, op: Recurrent, shape: _Shape) -> dict[str, Argument]:
    steps, _, batch, hidden = step.outputs[0].shape
    names = ["x", "r", "h", *({Cell.LSTM: ["c"], Cell.GRU: ["b"]}.get(op.cell, [])), "every", "last_h", "last_c"]
    arguments: dict[str, Argument] = {
        "steps": steps, "batch": batch, "hidden": hidden, "padded": shape.padded, "reversed": op.reversed,
    }  # fmt: skip
    for name, tensor in zip(names, (*step.inputs, *step.outputs), strict=False):
        arguments |= {name: pointer_to(tensor), f"{name}_strides": I64s(tensor.strides)}
    return arguments


def _launch(
    step: Step,
    op: Recurrent,
    shape: _Shape,
    arguments: dict[str, Argument],
    sequence: bool,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
) -> Launch:
    x, r = step.inputs[:2]
    vector = 16 // r.dtype.itemsize
    aligned = all(number % vector == 0 for number in (r.offset, r.shape[2], *r.strides[:2]))
    config: dict[str, int | bool | str] = {
        "cell": list(Cell).index(op.cell), "sequence": sequence, "threads": threads, "rows": shape.rows,
        "group": shape.group, "chunks": shape.chunks, "r_vector": aligned, "r_constant": is_constant(r),
        "x_t": STORAGE[x.dtype], "r_t": STORAGE[r.dtype],
    }  # fmt: skip
    return launch("recurrent", "recurrent.cuh", config, [], arguments, grid, threads, shared_bytes)


def _final_states(step: Step, context: Context) -> list[Launch]:
    """Without steps the last states are the first."""
    return [
        copy
        for source, output in zip(step.inputs[2:], step.outputs[1:], strict=False)
        if output.elements
        for copy in pointwise.launches(
            (ex.cast(ex.Arg(0, source.dtype), output.dtype),), {0: operand(source, 3)}, (output,), context, "recurrent"
        )
    ]
