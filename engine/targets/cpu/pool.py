"""Max and average pooling over any number of spatial axes, on channels-last tensors: the lanes are channels.

The window of each output pixel is cut to the part inside the image before it is walked, so that nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Pool, PoolKind, ReduceKind
from engine.plan.plan import Access as PlanAccess
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.expressions import working_dtype
from engine.targets.cpu.codegen.operands import Access, Cursor, Operand, operand_parameters
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, launch, pointer_to
from engine.targets.cpu.reduce import combined, identity_of
from engine.targets.cpu.spaces import Axes, operand, read_operands, split_tasks

_SETS = 4  # vectors of channels side by side


@dataclass(frozen=True)
class PoolSpec(KernelSpec):
    """`spatial` axes; operands of the epilogue lie along batch, the spatial axes and the channels."""

    kind: PoolKind
    spatial: int
    dilated: bool
    count_include_pad: bool
    dtype: DType
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "pool"

    @property
    def parameters(self) -> tuple[str, ...]:
        names = ["x", "x.batch", "channels", "units", "units_per_task"]
        for i in range(self.spatial):
            names += [
                f"{name}{i}" for name in ("x.stride", "size", "out", "kernel", "step", "begin", "end", "dilation")
            ]
        for name, access in self.operands():
            names += operand_parameters(name, access, self.spatial + 2)
        return tuple(names)

    def operands(self) -> list[tuple[str, Access]]:
        reads = [(f"read{i}", access) for i, access in enumerate(self.reads)]
        return reads + [(f"write{i}", access) for i, access in enumerate(self.writes)]

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


@dataclass(frozen=True)
class _Window:
    """Along one axis: the address step between taps, the taps inside the image, and how many count in an average."""

    stride: Int
    first: Int
    last: Int
    counted: Int


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: PoolSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.lanes = spec.isa.lanes
        self.dtype = working_dtype(spec.dtype)
        self.type = vector_type(element_type(self.dtype), self.lanes)
        self.operands = [
            Operand(kernel, name, a, spec.spatial + 2, name.startswith("write")) for name, a in spec.operands()
        ]

    def emit(self) -> None:
        b = self.b
        per_task = b.integer("units_per_task")
        first = b.mul(b.task, per_task)
        b.loop(first, b.smin(b.add(first, per_task), b.integer("units")), 1, lambda unit, _: self._pixel(unit))

    def _pixel(self, unit: Value) -> None:
        b, spec = self.b, self.spec
        rest: Int = unit
        places: list[Int] = []
        for i in reversed(range(spec.spatial)):
            size = b.integer(f"out{i}")
            places.insert(0, b.rem(rest, size))
            rest = b.div(rest, size)
        pointer = b.offset(b.pointer("x"), b.mul(rest, b.integer("x.batch")))
        windows = []
        for i, place in enumerate(places):
            window, origin = self._window(i, place)
            windows.append(window)
            pointer = b.offset(pointer, b.mul(origin, b.integer(f"x.stride{i}")))
        cursors = [operand.start for operand in self.operands]
        for axis, place in enumerate([rest, *places]):
            cursors = [o.moved(c, axis, place) for o, c in zip(self.operands, cursors, strict=True)]
        channels = b.integer("channels")
        group = _SETS * self.lanes
        whole = b.mul(b.div(channels, group), group)
        b.loop(0, whole, group, lambda c, _: self._channels(pointer, windows, cursors, c, _SETS, None))
        b.loop(
            whole, channels, self.lanes,
            lambda c, _: self._channels(
                pointer, windows, cursors, c, 1, b.tail_mask(self.lanes, b.sub(channels, c))
            ),
        )  # fmt: skip

    def _window(self, axis: int, place: Int) -> tuple[_Window, Int]:
        """The window of output `place` along an axis, and the (perhaps negative) input index of its first tap."""
        b = self.b
        size, kernel = b.integer(f"size{axis}"), b.integer(f"kernel{axis}")
        begin = b.integer(f"begin{axis}")
        dilation: Int = b.integer(f"dilation{axis}") if self.spec.dilated else 1
        origin = b.sub(b.mul(place, b.integer(f"step{axis}")), begin)

        def taps_before(index: Int) -> Int:
            """How many taps lie before an input index."""
            distance = b.smax(b.sub(index, origin), 0)
            return b.smin(kernel, b.div(b.add(distance, b.sub(dilation, 1)), dilation))

        first, last = taps_before(0), taps_before(size)
        counted = (
            taps_before(b.add(size, b.integer(f"end{axis}"))) if self.spec.count_include_pad else b.sub(last, first)
        )
        return _Window(b.mul(b.integer(f"x.stride{axis}"), dilation), first, last, counted), origin

    def _channels(
        self, pointer: Value, windows: list[_Window], cursors: list[Cursor], channel: Int, sets: int, mask: Value | None
    ) -> None:
        b, spec = self.b, self.spec
        kind = ReduceKind.MAX if spec.kind is PoolKind.MAX else ReduceKind.SUM
        places = [b.add(channel, s * self.lanes) for s in range(sets)]

        def walk(depth: int, at: Value, values: list[Value]) -> list[Value]:
            if depth < spec.spatial:
                window = windows[depth]
                return b.loop(
                    window.first, window.last, 1,
                    lambda k, v: walk(depth + 1, b.offset(at, b.mul(k, window.stride)), v), values,
                )  # fmt: skip
            loaded = [
                b.load_elements(spec.dtype, self.lanes, b.at(at, place, spec.dtype.itemsize), mask) for place in places
            ]
            return [combined(b, kind, self.dtype, v, x) for v, x in zip(values, loaded, strict=True)]

        start = [b.const(identity_of(kind, self.dtype), self.type)] * sets
        results = walk(0, pointer, start)
        if spec.kind is PoolKind.AVERAGE:
            taps: Int = 1
            for window in windows:
                taps = b.mul(taps, window.counted)
            count = b.splat(b.convert("sitofp", b.i64(taps), element_type(self.dtype)), self.lanes)
            results = [b.binary("fdiv", result, count) for result in results]
        rows = [o.row(c, self.lanes) for o, c in zip(self.operands, cursors, strict=True)]
        for place, acc in zip(places, results, strict=True):

            def load(i: int, place: Int = place) -> Value:
                return rows[i].load(place, mask)

            values = lower_expressions(b, spec.stores, load, acc, self.lanes)
            for row, value in zip(rows[len(spec.reads) :], values, strict=True):
                row.store(place, value, mask)


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """The input has its channels next to each other; all else is free."""
    assert isinstance(op, Pool)
    if op.kind is PoolKind.AVERAGE and not inputs[0].dtype.is_float:
        raise UnsupportedOp(f"Pool: an average of {inputs[0].dtype.value}; cast to a float first")
    order = (0, *range(2, len(op.kernel) + 2), 1)
    free = Requirement()
    return (Requirement(PlanAccess.INNER, order), *(free,) * (len(inputs) - 1)), (free,) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x = step.op, step.inputs[0]
    assert isinstance(op, Pool)
    output = step.outputs[0]
    if not output.elements:
        return []
    rank, spatial = len(output.shape), len(op.kernel)
    order = (0, *range(2, rank), 1)
    stores, reads = read_operands(op.stores, step.inputs, (), rank)
    axes = Axes(output.shape, [*reads, *(operand(out, rank) for out in step.outputs)]).ordered(order)
    accesses = [o.access() for o in axes.operands]
    spec = PoolSpec(
        context.isa, op.kind, spatial, any(d != 1 for d in op.dilations), op.count_include_pad, x.dtype,
        tuple(accesses[: len(reads)]), tuple(accesses[len(reads) :]), stores,
    )  # fmt: skip
    strides = operand(x, rank).strides
    units = axes.elements // axes.sizes[-1]
    window = 1
    args: dict[str, Slot] = {"x": pointer_to(x), "x.batch": strides[0], "channels": x.shape[1]}
    for i in range(spatial):
        window *= op.kernel[i]
        args |= {f"x.stride{i}": strides[i + 2], f"size{i}": x.shape[i + 2], f"out{i}": output.shape[i + 2]}
        args |= {f"kernel{i}": op.kernel[i], f"step{i}": op.strides[i], f"dilation{i}": op.dilations[i]}
        args |= {f"begin{i}": op.pads[i][0], f"end{i}": op.pads[i][1]}
    tasks, per_task = split_tasks(units, axes.elements * window, context.threads)
    args |= {"units": units, "units_per_task": per_task}
    for (name, _), o in zip(spec.operands(), axes.operands, strict=True):
        args |= o.slots(name)
    return [launch(spec, args, tasks)]
