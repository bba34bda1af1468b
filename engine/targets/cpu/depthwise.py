"""Depthwise convolutions: every channel by itself, vectors along the channels, a few neighbouring outputs at a time.

A block of outputs of one row keeps its sums in registers while the rows of the kernel pass; every input vector is
loaded once for all the outputs of the block that read it. Where the columns of a block lie is worked out once per block
and kept in scratch, for all channels: columns in the padding are a piece of zeros, outputs beyond the last are written
to scratch. So there are no variants for the edges. Rows in the padding are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.tile import Epilogue
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
from engine.targets.cpu.tiling import epilogue_of, zeros

_BLOCKS = (14, 8, 7, 6, 4, 2, 1)  # outputs at a time: 7 divides the widths of most image models
_ADDRESSES = 8  # worked out at a time
_LARGEST_KERNEL = 9  # columns: beyond, the sums and weights of a block leave no registers


@dataclass(frozen=True)
class DepthwiseSpec(KernelSpec):
    """`rows` × `columns` taps; `stride` and `dilation` are those along a row; `block` outputs at a time."""

    dtype: DType
    columns: int
    stride: int
    dilation: int
    block: int
    epilogue: Epilogue
    family: ClassVar[str] = "depthwise"

    @property
    def reads(self) -> list[int]:
        """The input columns that a block reads, counted from its first."""
        return sorted({o * self.stride + k * self.dilation for o in range(self.block) for k in range(self.columns)})

    @property
    def moving(self) -> list[str]:
        """Operands that differ from output position to output position."""
        return [name for name, _, _, rows in self.epilogue.tensors if rows]

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [name for name, *_ in self.epilogue.tensors]
        return (
            "x", "x.n", "x.y", "x.x", "weights", "weights.tap", "zero", *names,
            *(f"{name}.{axis}" for name in names for axis in "nyx" if name in self.moving),
            "channels", "channel_chunks", "row_chunks", "height", "width", "out_height", "out_width", "stride_y",
            "pad_y", "pad_x", "kernel_rows", "dilation_y", "dummy",
        )  # fmt: skip

    def emit(self, kernel: KernelBuilder) -> None:
        _Depthwise(self, kernel).emit()


class _Depthwise:
    """Writes the body of a `DepthwiseSpec`."""

    def __init__(self, spec: DepthwiseSpec, kernel: KernelBuilder) -> None:
        self.spec, self.k = spec, kernel
        self.itemsize = spec.dtype.itemsize
        self.lanes = spec.isa.lanes_of(self.itemsize)
        self.reads = spec.reads
        self.columns_table = kernel.scratch
        # The places of the outputs, one table per moving operand, lie before those of the columns.
        size = 8 * _padded(spec.block)
        self.tables = {name: kernel.offset(kernel.scratch, size * i) for i, name in enumerate(spec.moving)}
        self.columns_table = kernel.offset(kernel.scratch, size * len(spec.moving))

    def emit(self) -> None:
        k = self.k
        channel_chunks, row_chunks = k.integer("channel_chunks"), k.integer("row_chunks")
        chunk, rest = k.rem(k.task, channel_chunks), k.div(k.task, channel_chunks)
        rows, n = k.rem(rest, row_chunks), k.div(rest, row_chunks)
        vectors = k.div(k.add(k.integer("channels"), self.lanes - 1), self.lanes)
        first = k.mul(k.div(k.mul(vectors, chunk), channel_chunks), self.lanes)
        last = k.mul(k.div(k.mul(vectors, k.add(chunk, 1)), channel_chunks), self.lanes)
        self.first, self.last = first, k.smin(last, k.integer("channels"))
        height = k.integer("out_height")
        self.x = k.offset(k.pointer("x"), k.mul(n, k.integer("x.n")))
        self.bases = {name: k.pointer(name) for name, *_ in self.spec.epilogue.tensors}
        for name in self.spec.moving:
            self.bases[name] = k.offset(self.bases[name], k.mul(n, k.integer(f"{name}.n")))
        self.zero, self.dummy = k.pointer("zero"), k.offset(k.scratch, k.integer("dummy"))
        k.loop(
            k.div(k.mul(height, rows), row_chunks), k.div(k.mul(height, k.add(rows, 1)), row_chunks), 1,
            lambda y, _: self._row(y),
        )  # fmt: skip

    def _row(self, y: Value) -> None:
        k = self.k
        top = k.sub(k.mul(y, k.integer("stride_y")), k.integer("pad_y"))
        dilation, height, taps = k.integer("dilation_y"), k.integer("height"), k.integer("kernel_rows")
        # Kernel rows i with 0 <= top + i * dilation < height.
        from_row = k.div(k.add(k.smax(k.sub(0, top), 0), k.sub(dilation, 1)), dilation)
        to_row = k.smin(k.div(k.add(k.smax(k.sub(height, top), 0), k.sub(dilation, 1)), dilation), taps)
        width = k.integer("out_width")
        k.loop(0, width, self.spec.block, lambda x, _: self._block(x, y, top, from_row, to_row))

    def _block(self, x: Value, y: Value, top: Int, from_row: Int, to_row: Int) -> None:
        k = self.k
        self._point_at_columns(x, top, from_row, to_row)
        self._point_at_outputs(x, y)
        full = k.add(self.first, k.mul(k.div(k.sub(self.last, self.first), self.lanes), self.lanes))
        k.loop(self.first, full, self.lanes, lambda c, _: self._channels(c, None, from_row, to_row))
        rest = k.sub(self.last, full)
        mask = k.tail_mask(self.lanes, rest)
        k.branch(k.compare("sgt", rest, 0), lambda: self._channels(full, mask, from_row, to_row))

    def _point_at_columns(self, x: Value, top: Int, from_row: Int, to_row: Int) -> None:
        """Write where each column that the block reads lies, per kernel row. Eight addresses at a time."""
        k, spec = self.k, self.spec
        left = k.sub(k.mul(x, spec.stride), k.integer("pad_x"))
        row_bytes, column_bytes, width = k.integer("x.y"), k.integer("x.x"), k.integer("width")
        padded = [*self.reads, *[self.reads[-1]] * (-len(self.reads) % _ADDRESSES)]
        inside, offsets = [], []
        for i in range(0, len(padded), _ADDRESSES):
            columns = _vector(padded[i : i + _ADDRESSES])
            inside.append(k.compare("ult", k.binary("add", columns, self._splat(left)), self._splat(width)))
            offsets.append(k.binary("mul", columns, self._splat(column_bytes)))
        zero = self._splat(k.convert("ptrtoint", self.zero, "i64"))

        def row(i: Value, _: list[Value]) -> None:
            line = k.offset(self.x, k.mul(k.add(top, k.mul(i, k.integer("dilation_y"))), row_bytes))
            start = self._splat(k.convert("ptrtoint", k.offset(line, k.mul(left, column_bytes)), "i64"))
            table = k.offset(self.columns_table, k.mul(i, 8 * len(padded)))
            for number, (fits, offset) in enumerate(zip(inside, offsets, strict=True)):
                place = k.select(fits, k.binary("add", start, offset), zero)
                k.store(place, k.offset(table, 8 * _ADDRESSES * number), 8)

        k.loop(from_row, to_row, 1, row)

    def _point_at_outputs(self, x: Value, y: Value) -> None:
        """Write where the outputs, and the epilogue inputs that belong to them, lie. What is beyond the last output
        reads like the last one and is written to scratch."""
        k = self.k
        last = self._splat(k.sub(k.integer("out_width"), 1))
        dummy = self._splat(k.convert("ptrtoint", self.dummy, "i64"))
        for first in range(0, self.spec.block, _ADDRESSES):
            columns = k.binary("add", _vector(range(first, first + _ADDRESSES)), self._splat(x))
            beyond = k.compare("sgt", columns, last)
            columns = k.select(beyond, last, columns)
            for name in self.spec.moving:
                line = k.convert("ptrtoint", k.offset(self.bases[name], k.mul(y, k.integer(f"{name}.y"))), "i64")
                steps = k.binary("mul", columns, self._splat(k.integer(f"{name}.x")))
                place = k.binary("add", self._splat(line), steps)
                if name.startswith("out"):
                    place = k.select(beyond, dummy, place)
                k.store(place, k.offset(self.tables[name], 8 * first), 8)

    def _splat(self, value: Int) -> Value:
        return self.k.splat(self.k.i64(value), _ADDRESSES)

    def _channels(self, c: Int, mask: Value | None, from_row: Int, to_row: Int) -> None:
        """One vector of channels of all outputs of the block."""
        k, spec = self.k, self.spec
        at = k.mul(c, self.itemsize)
        weights = k.offset(k.pointer("weights"), at)
        tap_bytes = k.integer("weights.tap")

        def row(i: Value, sums: list[Value]) -> list[Value]:
            sums = list(sums)
            line = k.offset(weights, k.mul(k.mul(i, spec.columns), tap_bytes))
            taps = [
                k.load_elements(spec.dtype, self.lanes, k.offset(line, k.mul(tap_bytes, column)), mask)
                for column in range(spec.columns)
            ]
            table = k.offset(self.columns_table, k.mul(i, 8 * _padded(len(self.reads))))
            for number, read in enumerate(self.reads):
                column = k.load("ptr", k.offset(table, 8 * number), 8)
                value = k.load_elements(spec.dtype, self.lanes, k.offset(column, at), mask)
                for o in range(spec.block):
                    tap, odd = divmod(read - o * spec.stride, spec.dilation)
                    if not odd and 0 <= tap < spec.columns:
                        sums[o] = k.fma(value, taps[tap], sums[o])
            return sums

        zero = Value("zeroinitializer", vector_type(element_type(spec.dtype), self.lanes))
        sums = k.loop(from_row, to_row, 1, row, [zero] * spec.block)
        fixed: dict[int, Value] = {}
        for o, acc in enumerate(sums):

            def load(index: int, o: int = o) -> Value:
                arg, name = spec.epilogue.args[index], f"arg{index}"
                if index in fixed:
                    return fixed[index]
                place = k.load("ptr", k.offset(self.tables[name], 8 * o), 8) if arg.rows else self.bases[name]
                if arg.columns:
                    value = k.load_elements(arg.dtype, self.lanes, k.offset(place, k.mul(c, arg.dtype.itemsize)), mask)
                else:
                    value = k.load_splat(arg.dtype, self.lanes, place)
                if not arg.rows:
                    fixed[index] = value
                return value

            values = lower_expressions(k, spec.epilogue.stores, load, acc, self.lanes)
            for number, (value, store) in enumerate(zip(values, spec.epilogue.stores, strict=True)):
                place = k.load("ptr", k.offset(self.tables[f"out{number}"], 8 * o), 8)
                k.store_elements(store.dtype, value, k.offset(place, k.mul(c, store.dtype.itemsize)), mask)


def _padded(count: int) -> int:
    return -(-count // _ADDRESSES) * _ADDRESSES


def _vector(values: Sequence[int]) -> Value:
    """A literal of as many i64 as are worked out at a time."""
    return Value(f"<{', '.join(f'i64 {value}' for value in values)}>", vector_type("i64", len(values)))


def fits(conv: Conv, x: Tensor, w: Tensor) -> bool:
    """Whether the convolution is depthwise, in one or two dimensions, with weights known beforehand."""
    return (
        conv.groups == x.shape[1] == w.shape[0]
        and w.shape[1] == 1
        and not conv.transposed
        and len(conv.strides) <= 2
        and w.shape[-1] <= _LARGEST_KERNEL
        and is_constant(w)
    )


def lower(step: Step, conv: Conv, context: Context) -> list[Launch]:
    x, w = (_two_dimensional(t) for t in step.inputs[:2])
    outputs = [_two_dimensional(t) for t in step.outputs]
    rank = len(step.outputs[0].shape)
    epilogue, args = epilogue_of(conv, conv.stores, step.inputs, step.outputs[0].shape, (0, *range(2, rank), 1))
    batch, channels, out_height, out_width = outputs[0].shape
    (stride_y, stride_x), (dilation_y, dilation_x) = (_pair(v) for v in (conv.strides, conv.dilations))
    pads = [begin for begin, _ in conv.pads]
    pad_y, pad_x = pads if len(pads) == 2 else (0, pads[0])
    blocks = [block for block in _BLOCKS if block + w.shape[3] + 3 <= max(11, context.isa.registers)]
    # Every block costs about two outputs more than it has.
    block = min(blocks, key=lambda b: (-(-out_width // b) * (b + 2), -b))
    spec = DepthwiseSpec(context.isa, x.dtype, w.shape[3], stride_x, dilation_x, block, epilogue)
    itemsize = x.dtype.itemsize
    slots: dict[str, Slot] = {
        "x": pointer_to(x), "x.n": x.strides[0] * itemsize, "x.y": x.strides[2] * itemsize,
        "x.x": x.strides[3] * itemsize, "weights": Pointer(context.weights.packed(w, "taps first", _taps_first)),
        "weights.tap": channels * itemsize, "zero": zeros(channels * itemsize),
    }  # fmt: skip
    strides = [(f"out{i}", pointer_to(t), [s * t.dtype.itemsize for s in t.strides]) for i, t in enumerate(outputs)]
    for i, (tensor, along) in enumerate(args):
        inner = along if rank == 4 else (along[0], 0, *along[1:])
        strides.append((f"arg{i}", pointer_to(tensor), [inner[0], inner[3], inner[1], inner[2]]))
    for name, pointer, (n, _, y, x_step) in strides:
        slots |= {name: pointer}
        if name in spec.moving:
            slots |= {f"{name}.n": n, f"{name}.y": y, f"{name}.x": x_step}
    lanes = context.isa.lanes_of(itemsize)
    vectors = -(-channels // lanes)
    wanted = 4 * context.threads if context.threads > 1 else 1
    row_chunks = min(out_height, -(-wanted // batch))
    # Whole rows where there are enough of them to share out evenly, else groups of channels.
    channel_chunks = 1
    if batch * row_chunks < wanted or batch * out_height < 4 * wanted:
        row_chunks, channel_chunks = 1, min(vectors, -(-wanted // batch))
    table_bytes = _padded(block) * 8 * len(spec.moving) + w.shape[2] * _padded(len(spec.reads)) * 8
    widest = max(store.dtype.itemsize for store in conv.stores)
    slots |= {
        "channels": channels, "channel_chunks": channel_chunks, "row_chunks": row_chunks, "height": x.shape[2],
        "width": x.shape[3], "out_height": out_height, "out_width": out_width, "stride_y": stride_y, "pad_y": pad_y,
        "pad_x": pad_x, "kernel_rows": w.shape[2], "dilation_y": dilation_y, "dummy": table_bytes,
    }  # fmt: skip
    return [launch(spec, slots, batch * row_chunks * channel_chunks, table_bytes + channels * widest)]


def _taps_first(weights: np.ndarray) -> np.ndarray:
    """[channels, 1, rows, columns] → [rows, columns, channels]."""
    return weights[:, 0].transpose(1, 2, 0)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values if len(values) == 2 else (1, values[0])


def _two_dimensional(tensor: Tensor) -> Tensor:
    """A tensor with one spatial axis as one with two."""
    if len(tensor.shape) == 4:
        return tensor
    (n, c, x), (sn, sc, sx) = tensor.shape, tensor.strides
    return Tensor(tensor.buffer, tensor.dtype, (n, c, 1, x), (sn, sc, 0, sx), tensor.offset)
