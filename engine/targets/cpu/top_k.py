"""The k largest or smallest elements along an axis: a heap of the best so far, its worst at the root, then sorted.

Elements are compared as integers in an order that holds for every type (a NaN is larger than any number), places where
they are equal. A row takes O(n log k) steps, in whatever order its elements come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Op, TopK
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Builder, Int, Value, memory_type
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, launch
from engine.targets.cpu.spaces import Axes, operand, split_tasks

_ITEM = 8  # bytes of a key, and of a place


@dataclass(frozen=True)
class TopKSpec(KernelSpec):
    """Rows lie along `rank` axes."""

    dtype: DType
    largest: bool
    rank: int
    family: ClassVar[str] = "top_k"

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [*(f"size{axis}" for axis in range(self.rank)), "units", "units_per_task", "n", "k"]
        for name in ("x", "values", "places"):
            names += [name, f"{name}.along", *(f"{name}.stride{axis}" for axis in range(self.rank))]
        return tuple(names)

    def emit(self, kernel: KernelBuilder) -> None:
        kernel.module.function(
            "sift", [("keys", "ptr"), ("places", "ptr"), ("root", "i64"), ("count", "i64")], _sift, local=True
        )
        per_task = kernel.integer("units_per_task")
        first = kernel.mul(kernel.task, per_task)
        last = kernel.smin(kernel.add(first, per_task), kernel.integer("units"))
        kernel.loop(first, last, 1, lambda unit, _: self._row(kernel, unit))

    def _row(self, b: KernelBuilder, unit: Value) -> None:
        n, k = b.integer("n"), b.integer("k")
        x, values, places = (self._place(b, name, unit) for name in ("x", "values", "places"))
        keys = b.scratch
        held = b.at(keys, k, _ITEM)

        def put(i: Int, key: Value, place: Int) -> None:
            b.store(key, b.at(keys, i, _ITEM), _ITEM)
            b.store(b.i64(place), b.at(held, i, _ITEM), _ITEM)

        def sift(start: Int, count: Int) -> None:
            b.call_local("sift", "void", keys, held, b.i64(start), b.i64(count))

        def better(i: Value) -> None:
            key = self._key(b, x, i)
            worst = b.load("i64", keys, _ITEM)

            def replace() -> None:
                put(0, key, i)
                sift(0, k)

            b.branch(b.compare("slt", key, worst), replace)  # a later element does not win where it is equal

        def extract(i: Value) -> None:
            end = b.sub(b.sub(k, 1), i)

            def move() -> None:
                """The worst of the heap goes behind the others."""
                _swap(b, keys, held, 0, end)
                sift(0, end)

            b.branch(b.compare("sgt", end, 0), move)

        half = b.div(k, 2)
        b.loop(0, k, 1, lambda i, _: put(i, self._key(b, x, i), i))
        b.loop(0, half, 1, lambda i, _: sift(b.sub(b.sub(half, 1), i), k))
        b.loop(k, n, 1, lambda i, _: better(i))
        b.loop(0, k, 1, lambda i, _: extract(i))

        def write(i: Value) -> None:
            place = b.load("i64", b.at(held, i, _ITEM), _ITEM)
            element = b.load(memory_type(self.dtype), b.offset(x, b.mul(place, b.integer("x.along"))))
            b.store(element, b.offset(values, b.mul(i, b.integer("values.along"))))
            b.store(place, b.offset(places, b.mul(i, b.integer("places.along"))))

        b.loop(0, k, 1, lambda i, _: write(i))

    def _place(self, b: KernelBuilder, name: str, unit: Value) -> Value:
        rest: Int = unit
        pointer = b.pointer(name)
        for axis in reversed(range(self.rank)):
            size = b.integer(f"size{axis}")
            pointer = b.offset(pointer, b.mul(b.rem(rest, size), b.integer(f"{name}.stride{axis}")))
            rest = b.div(rest, size)
        return pointer

    def _key(self, b: KernelBuilder, x: Value, i: Int) -> Value:
        """An integer that is smaller the better the element is."""
        value = b.load_elements(self.dtype, 0, b.offset(x, b.mul(i, b.integer("x.along"))))
        if self.dtype.is_float:
            bits = 64 if value.type == "double" else 32
            kind, most = f"i{bits}", (1 << (bits - 1)) - 1
            whole = b.convert("bitcast", b.binary("fadd", value, b.const(0.0, value.type)), kind)  # −0 is 0
            whole = b.select(b.fcmp("uno", value, value), b.const(most, kind), whole)
            sign = b.binary("ashr", whole, b.const(bits - 1, kind))
            value = b.binary("xor", whole, b.binary("and", sign, b.const(most, kind)))
        elif self.dtype is DType.U64:
            value = b.binary("xor", value, b.const(-(2**63), "i64"))
        if value.type != "i64":
            value = b.convert("sext" if self.dtype.is_signed else "zext", value, "i64")
        return b.binary("xor", value, b.const(-1, "i64")) if self.largest else value


def _sift(b: Builder, arguments: list[Value]) -> None:
    """Move the item at `root` down until none below it is worse."""
    keys, places, root, count = arguments

    def worse(i: Value, j: Value) -> Value:
        a, c = (b.load("i64", b.at(keys, at, _ITEM), _ITEM) for at in (i, j))
        p, q = (b.load("i64", b.at(places, at, _ITEM), _ITEM) for at in (i, j))
        tie = b.binary("and", b.compare("eq", a, c), b.compare("sgt", p, q))
        return b.binary("or", b.compare("sgt", a, c), tie)

    def turn(values: list[Value]) -> tuple[Value, list[Value]]:
        (i,) = values
        child = b.i64(b.add(b.mul(i, 2), 1))

        def down() -> list[Value]:
            right = b.i64(b.add(child, 1))
            (worst,) = b.branch(
                b.compare("slt", right, count), lambda: [b.select(worse(right, child), right, child)], lambda: [child]
            )

            def swap() -> list[Value]:
                _swap(b, keys, places, i, worst)
                return [b.const(True, "i1"), worst]

            return b.branch(worse(worst, i), swap, lambda: [b.const(False, "i1"), i])

        again, following = b.branch(b.compare("slt", child, count), down, lambda: [b.const(False, "i1"), i])
        return again, [following]

    b.repeat(turn, [root])


def _swap(b: Builder, keys: Value, places: Value, i: Int, j: Int) -> None:
    for array in (keys, places):
        first, second = b.at(array, i, _ITEM), b.at(array, j, _ITEM)
        a, c = b.load("i64", first, _ITEM), b.load("i64", second, _ITEM)
        b.store(c, first, _ITEM)
        b.store(a, second, _ITEM)


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, TopK)
    if not (inputs[0].dtype.is_float or inputs[0].dtype.is_int):
        raise UnsupportedOp(f"TopK of {inputs[0].dtype.value}")
    return (Requirement(),), (Requirement(), Requirement())


def lower(step: Step, context: Context) -> list[Launch]:
    op, x = step.op, step.inputs[0]
    assert isinstance(op, TopK)
    if not step.outputs[0].elements:
        return []
    rank = len(x.shape)
    others = [axis for axis in range(rank) if axis != op.axis]
    every = [operand(tensor, rank) for tensor in (x, *step.outputs)]
    rows = Axes(tuple(x.shape[axis] for axis in others), [o.along(others) for o in every])
    rows, _ = rows.merged((0,) * len(others))
    n, k = x.shape[op.axis], step.outputs[0].shape[op.axis]
    units = rows.elements
    tasks, per_task = split_tasks(units, units * n, context.threads, 4096)
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(rows.sizes)}
    args |= {"units": units, "units_per_task": per_task, "n": n, "k": k}
    for name, o, row in zip(("x", "values", "places"), every, rows.operands, strict=True):
        args |= {name: o.pointer, f"{name}.along": o.strides[op.axis]}
        args |= {f"{name}.stride{axis}": stride for axis, stride in enumerate(row.strides)}
    return [launch(TopKSpec(context.isa, x.dtype, op.largest, len(rows.sizes)), args, tasks, 2 * _ITEM * k)]
