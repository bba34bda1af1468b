"""Runs one step of a plan through a kernel family, on memory with guard zones: what kernel tests are written with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Op
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cpu.codegen.isa import Isa, host_isas
from engine.targets.cpu.families import family_of
from engine.targets.cpu.jit import Compiler
from engine.targets.cpu.kernel import Context, Launch, Pointer, StatusWord, WeightStore

GUARD = 256
POISON = 0xA7
ISAS = [name for name in host_isas() if name != "generic"]
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


@dataclass(frozen=True)
class Layout:
    """How a test tensor lies in memory: its axes from outermost to innermost, `gap` unused elements after each run of
    the innermost axis, and whether the innermost axis has stride 2."""

    order: tuple[int, ...] | None = None
    gap: int = 0
    step: int = 1


class StepResult:
    """Outputs of a step, and the status word that its kernels left."""

    def __init__(self, outputs: list[np.ndarray], status: int, launches: list[Launch]) -> None:
        self.outputs, self.status, self.launches = outputs, status, launches


@cache
def _compiler() -> Compiler:
    return Compiler(None)


class _Memory:
    """A tensor in the middle of poisoned memory."""

    def __init__(self, shape: tuple[int, ...], dtype: DType, layout: Layout) -> None:
        order = layout.order or tuple(range(len(shape)))
        padded = list(shape)
        if order:
            padded[order[-1]] = (shape[order[-1]] + layout.gap) * layout.step
        strides = list(row_major(tuple(padded), order))
        if order:
            strides[order[-1]] *= layout.step
        size = int(np.prod(padded)) * dtype.itemsize
        self.raw = np.full(size + 2 * GUARD, POISON, np.uint8)
        buffer = Buffer("test", BufferKind.CONSTANT, self.raw.nbytes, self.raw)
        self.tensor = Tensor(buffer, dtype, shape, tuple(strides), GUARD // dtype.itemsize)
        self.view = np.lib.stride_tricks.as_strided(
            self.raw[GUARD : GUARD + max(dtype.itemsize, 1)].view(dtype.numpy), shape,
            tuple(stride * dtype.itemsize for stride in strides),
        )  # fmt: skip

    def outside_is_untouched(self) -> bool:
        copy = self.raw.copy()
        inside = np.lib.stride_tricks.as_strided(
            copy[GUARD : GUARD + self.view.itemsize].view(self.view.dtype), self.view.shape, self.view.strides
        )
        inside.view(np.dtype(f"u{self.view.itemsize}"))[...] = int.from_bytes(
            bytes([POISON] * self.view.itemsize), "little"
        )
        return bool((copy == POISON).all())


def place(array: np.ndarray, layout: Layout = Layout()) -> Tensor:
    """A tensor with the content of `array`."""
    memory = _Memory(array.shape, DType.of(array.dtype), layout)
    memory.view[...] = array
    return memory.tensor


def run_step(
    op: Op,
    inputs: Sequence[np.ndarray | Tensor],
    isa: str = "",
    layouts: Sequence[Layout] = (),
    threads: int = 2,
    name: str = "step",
) -> StepResult:
    """Lower and run `op`. `layouts` are those of the outputs. Fails if a kernel writes outside of its outputs."""
    tensors = tuple(t if isinstance(t, Tensor) else place(t) for t in inputs)
    results = []
    for i, (dtype, shape) in enumerate(op.infer(tensors)):
        results.append(_Memory(tuple(int(str(d)) for d in shape), dtype, layouts[i] if layouts else Layout()))
    outputs = tuple(memory.tensor for memory in results)
    step = Step(name, op, tensors, outputs, op.cost(tensors, outputs))
    chosen: Isa = host_isas()[isa or ISAS[0]]
    launches = family_of(op).lower(step, Context(chosen, threads, WeightStore()))
    status = run_launches(launches)
    for memory in results:
        assert memory.outside_is_untouched(), f"{op.name} wrote outside of its output"
    return StepResult([memory.view for memory in results], status, launches)


def run_launches(launches: Sequence[Launch], repeat: int = 1) -> int:
    """Run launches one task after the other (in reverse, to show that their order does not matter); the status word."""
    status = np.zeros(1, np.int64)
    kernels = _compiler().load([launch.spec for launch in launches])
    for _ in range(repeat):
        for launch in launches:
            arguments = np.zeros(max(1, len(launch.args)), np.int64)
            for i, slot in enumerate(launch.args):
                if isinstance(slot, Pointer):
                    assert slot.buffer.data is not None
                    arguments[i] = slot.buffer.data.ctypes.data + slot.offset
                elif isinstance(slot, StatusWord):
                    arguments[i] = status.ctypes.data
                elif isinstance(slot, float):
                    arguments[i] = int(np.float32(slot).view(np.uint32))
                else:
                    arguments[i] = slot
            scratch = np.full(launch.scratch_bytes + 2 * GUARD, POISON, np.uint8)
            start = GUARD + (-(scratch.ctypes.data + GUARD)) % 64
            function = _KERNEL(kernels[launch.spec.symbol])
            for task in reversed(range(launch.tasks)):
                function(arguments.ctypes.data, task, scratch.ctypes.data + start)
            assert (scratch[start + launch.scratch_bytes :] == POISON).all(), f"{launch.spec.family}: scratch overrun"
            assert (scratch[:start] == POISON).all(), f"{launch.spec.family}: scratch underrun"
    return int(status[0])
