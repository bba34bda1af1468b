"""Recurrent networks: one task takes some rows of the batch through all steps of one direction.

A block of units has all its gates in registers: the products with the state are summed, the activations applied and
the new state stored without a detour. The old state stays until the step is done, so two buffers take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Cell, Op, Recurrent
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, Tensor
from engine.targets.cpu.codegen.emit import Int, Value, vector_type
from engine.targets.cpu.codegen.vector_math import VectorMath
from engine.targets.cpu.kernel import (
    Context,
    KernelBuilder,
    KernelSpec,
    Launch,
    Pointer,
    Slot,
    is_constant,
    launch,
    pointer_to,
)

_FLOAT = 4  # bytes
_ROWS = 4  # at most: with four gates that is sixteen accumulators


@dataclass(frozen=True)
class RecurrentSpec(KernelSpec):
    """`rows` of the batch and `vectors` · lanes units at a time."""

    cell: Cell
    rows: int
    vectors: int
    family: ClassVar[str] = "recurrent"

    @property
    def units(self) -> int:
        return self.vectors * self.isa.lanes

    @property
    def parameters(self) -> tuple[str, ...]:
        sizes = ("steps", "hidden", "padded", "batch", "row_blocks", "reversed")
        return (*sizes, *(f"{name}{part}" for name, axes in self.tensors().items() for part in ("", *axes)))

    def tensors(self) -> dict[str, tuple[str, ...]]:
        """The operands and results in the order of the operator, with the axes that have strides."""
        step, state = (".step", ".direction", ".row"), (".direction", ".row")
        named = {"x": step, "r": (".direction",), "h": state}
        if self.cell is Cell.LSTM:
            named["c"] = state
        if self.cell is Cell.GRU:
            named["b"] = (".direction",)
        named |= {"every": step, "last_h": state}
        return named | ({"last_c": state} if self.cell is Cell.LSTM else {})

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: RecurrentSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.lanes = spec.isa.lanes
        self.type = vector_type("float", self.lanes)
        self.math = VectorMath(kernel, self.lanes)
        self.hidden = kernel.integer("hidden")
        row_blocks = kernel.integer("row_blocks")
        self.direction = kernel.div(kernel.task, row_blocks)
        first = kernel.mul(kernel.rem(kernel.task, row_blocks), spec.rows)
        # Rows past the end of the batch do the last one again: the same numbers to the same places.
        last = kernel.sub(kernel.integer("batch"), 1)
        self.rows = [kernel.smin(kernel.add(first, i), last) for i in range(spec.rows)]
        self.row_bytes = kernel.mul(kernel.integer("padded"), _FLOAT)

    def emit(self) -> None:
        b, spec = self.b, self.spec
        h, other, c = (b.offset(b.scratch, b.mul(self.row_bytes, i * spec.rows)) for i in range(3))
        self._states("h", h, load=True)
        if spec.cell is Cell.LSTM:
            self._states("c", c, load=True)
        backwards = b.compare("eq", self.direction, b.integer("reversed"))
        steps = b.integer("steps")

        def step(i: Value, states: list[Value]) -> list[Value]:
            before, after = states
            t = b.select(backwards, b.i64(b.sub(b.sub(steps, 1), i)), i)
            weights = b.offset(b.pointer("r"), b.mul(self.direction, b.integer("r.direction")))
            b.loop(
                0, b.integer("padded"), spec.units, lambda u, w: self._block(t, u, w[0], before, after, c), [weights]
            )
            return [after, before]

        h, _ = b.loop(0, steps, 1, step, [h, other])
        self._states("last_h", h, load=False)
        if spec.cell is Cell.LSTM:
            self._states("last_c", c, load=False)

    def _states(self, name: str, scratch: Value, *, load: bool) -> None:
        """Copy the rows of a state in or out."""
        b = self.b
        for i, row in enumerate(self.rows):
            outside = self._place(name, row)
            inside = b.offset(scratch, b.mul(self.row_bytes, i))

            def copy(unit: Value, _: list[Value], outside: Value = outside, inside: Value = inside) -> None:
                source, target = (outside, inside) if load else (inside, outside)
                mask = self._mask(unit)
                value = b.load_elements(DType.F32, self.lanes, b.at(source, unit, _FLOAT), mask)
                b.store_elements(DType.F32, value, b.at(target, unit, _FLOAT), None if load else mask)

            b.loop(0, b.integer("padded"), self.lanes, copy)

    def _place(self, name: str, row: Int, step: Int | None = None) -> Value:
        b = self.b
        place = b.offset(b.pointer(name), b.mul(self.direction, b.integer(f"{name}.direction")))
        place = b.offset(place, b.mul(row, b.integer(f"{name}.row")))
        return place if step is None else b.offset(place, b.mul(step, b.integer(f"{name}.step")))

    def _mask(self, unit: Int) -> Value:
        return self.b.tail_mask(self.lanes, self.b.sub(self.hidden, unit))

    def _block(
        self, step: Value, unit: Value, weights: Value, before: Value, after: Value, cells: Value
    ) -> list[Value]:
        """All gates of some units for one step; returns where the weights of the next units are."""
        b, spec = self.b, self.spec
        gates, vectors = spec.cell.gates, spec.vectors
        units = [b.add(unit, v * self.lanes) for v in range(vectors)]
        masks = [self._mask(u) for u in units]
        inputs = [
            [
                self._input(step, row, gate, u, mask)
                for gate in range(gates)
                for u, mask in zip(units, masks, strict=True)
            ]
            for row in self.rows
        ]
        sums = [list(row) for row in inputs]
        if spec.cell is Cell.GRU:
            bias = b.offset(b.pointer("b"), b.mul(self.direction, b.integer("b.direction")))
            for v, (u, mask) in enumerate(zip(units, masks, strict=True)):
                shift = b.load_elements(DType.F32, self.lanes, b.at(bias, u, _FLOAT), mask)
                for own in sums:
                    own[2 * vectors + v] = shift
        width = gates * vectors

        def term(k: Value, carried: list[Value]) -> list[Value]:
            place, *acc = carried
            loaded = [b.load(self.type, b.offset(place, i * 4 * self.lanes), 4 * self.lanes) for i in range(width)]
            for i in range(spec.rows):
                state = b.load("float", b.at(b.offset(before, b.mul(self.row_bytes, i)), k, _FLOAT), _FLOAT)
                wide = b.splat(state, self.lanes)
                for j in range(width):
                    acc[i * width + j] = b.fma(wide, loaded[j], acc[i * width + j])
            return [b.offset(place, width * 4 * self.lanes), *acc]

        weights, *flat = b.loop(0, self.hidden, 1, term, [weights, *(value for row in sums for value in row)])
        for i, row in enumerate(self.rows):
            own = flat[i * width : (i + 1) * width]
            every = self._place("every", row, step)
            for v, (u, mask) in enumerate(zip(units, masks, strict=True)):
                inside = b.add(b.mul(self.row_bytes, i), b.mul(u, _FLOAT))
                state = self._unit(own[v::vectors], inputs[i][v::vectors], before, cells, inside)
                b.store(state, b.offset(after, inside), _FLOAT)
                b.store_elements(DType.F32, state, b.at(every, u, _FLOAT), mask)
        return [weights]

    def _input(self, step: Value, row: Int, gate: int, unit: Int, mask: Value) -> Value:
        b = self.b
        column = b.add(b.mul(self.hidden, gate), unit)
        return b.load_elements(DType.F32, self.lanes, b.at(self._place("x", row, step), column, _FLOAT), mask)

    def _unit(self, sums: list[Value], inputs: list[Value], before: Value, cells: Value, inside: Int) -> Value:
        """The new state of a vector of units; `inside` is its place in the rows of the states."""
        b, math = self.b, self.math
        match self.spec.cell:
            case Cell.RNN_TANH:
                return math.tanh(sums[0])
            case Cell.RNN_RELU:
                return b.maximum(sums[0], b.const(0, self.type))
            case Cell.GRU:
                update, reset = math.sigmoid(sums[0]), math.sigmoid(sums[1])
                new = math.tanh(b.fma(reset, sums[2], inputs[2]))
                old = b.load(self.type, b.offset(before, inside), _FLOAT)
                return b.fma(update, b.binary("fsub", old, new), new)
            case Cell.LSTM:
                enter, leave, keep = (math.sigmoid(value) for value in sums[:3])
                place = b.offset(cells, inside)
                kept = b.binary("fmul", keep, b.load(self.type, place, _FLOAT))
                cell = b.fma(enter, math.tanh(sums[3]), kept)
                b.store(cell, place, _FLOAT)
                return b.binary("fmul", leave, math.tanh(cell))


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Units lie next to each other; all other strides are free. The recurrent weights are constants."""
    assert isinstance(op, Recurrent)
    if any(tensor.dtype is not DType.F32 for tensor in inputs):
        raise UnsupportedOp(f"Recurrent on {inputs[0].dtype.value}: the CPU kernel computes float32; cast the operands")
    if not is_constant(inputs[1]):
        raise UnsupportedOp("Recurrent with weights that are computed")
    needs = tuple(Requirement(Access.INNER, tuple(range(len(tensor.shape)))) for tensor in inputs)
    outputs = ((0, 1, 2, 3), (0, 1, 2), (0, 1, 2))[: 3 if op.cell is Cell.LSTM else 2]
    return needs, tuple(Requirement(Access.INNER, order) for order in outputs)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Recurrent)
    steps, directions, batch, hidden = step.outputs[0].shape
    if not directions * batch * hidden:
        return []
    rows = _rows(directions * batch, context)
    # Few rows have few sums in flight: two vectors of units keep the multipliers busy.
    spec = RecurrentSpec(context.isa, op.cell, rows, 2 if rows == 1 and hidden > context.isa.lanes else 1)
    padded = -(-hidden // spec.units) * spec.units
    row_blocks = -(-batch // rows)
    args: dict[str, Slot] = {"steps": steps, "hidden": hidden, "padded": padded, "batch": batch}
    args |= {"row_blocks": row_blocks, "reversed": op.reversed}
    for (name, axes), tensor in zip(spec.tensors().items(), (*step.inputs, *step.outputs), strict=True):
        strides = [stride * _FLOAT for stride in tensor.strides]
        args[name] = pointer_to(tensor)
        if name == "r":
            args[name] = Pointer(_packed(tensor, op.cell, spec.units, context))
            strides = [op.cell.gates * padded * hidden * _FLOAT]
        args |= {f"{name}{axis}": stride for axis, stride in zip(axes, strides, strict=False)}
    return [launch(spec, args, directions * row_blocks, 3 * rows * padded * _FLOAT)]


def _rows(total: int, context: Context) -> int:
    """Rows of a task: enough to use each weight more than once, few enough that all threads have some."""
    most = _ROWS if context.isa.registers >= 32 else _ROWS // 2
    rows = 1
    while rows < most and 2 * rows * context.threads <= total:
        rows *= 2
    return rows


def _packed(weights: Tensor, cell: Cell, units: int, context: Context) -> Buffer:
    """[directions, blocks of units, hidden, gates, units], with zeros for the units that fill up the last block."""

    def pack(array: np.ndarray) -> np.ndarray:
        directions, _, hidden = array.shape
        split = array.reshape(directions, cell.gates, hidden, hidden)
        missing = -hidden % units
        whole = np.pad(split, ((0, 0), (0, 0), (0, missing), (0, 0)))
        blocks = whole.reshape(directions, cell.gates, -1, units, hidden)
        return blocks.transpose(0, 2, 4, 1, 3)

    return context.weights.packed(weights, f"recurrent-{units}", pack)
