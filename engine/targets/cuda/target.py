"""The CUDA target: binds plans to kernels and memory, captures them in CUDA graphs, and runs them.

A `CudaTarget` belongs to one model. It owns the device's copy of the weights and one region of device memory that all
its plans share: their inputs, outputs and intermediates, one plan running at a time. A run is: copy the feeds to pinned
memory, one transfer in, one graph launch, one transfer out. Nothing is allocated on that path.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path

import cupy
import numpy as np

from engine.errors import DeviceError, ShapeError
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Op
from engine.passes.traits import Traits
from engine.plan.plan import Plan, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.specs import DeviceInfo, StepStat
from engine.targets.base import Resident
from engine.targets.cuda.device import Device
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import (
    ALIGNMENT,
    Context,
    Launch,
    Pointer,
    TensorMap,
    WeightStore,
    ceildiv,
    pack,
    workspace_bytes,
)

SAMPLE_EVERY = 16
"""One run in so many writes time stamps; its step times stand for the others."""
_STAMP_BYTES = 16
_STAMP_EMPTY = 0xFF


class CudaTarget:
    """Runs plans on GPU number `index`. `overlap` lets kernels start while the one before drains, where the GPU can."""

    traits = Traits(channels_last=True, storage_type=DType.F16)

    def __init__(self, index: int = 0, cache: Path | None = None, overlap: bool = True) -> None:
        self.device = Device(index, cache)
        self.overlap = overlap and self.device.architecture.dependent_launch
        self.weights = WeightStore()
        self.lock = threading.RLock()
        self._constants: dict[int, tuple[Buffer, cupy.ndarray]] = {}
        self._region: cupy.cuda.MemoryPointer | None = None
        self._staging: cupy.cuda.PinnedMemoryPointer | None = None
        self._executables: weakref.WeakSet[Executable] = weakref.WeakSet()
        self.region_bytes = 0
        self.staging_bytes = 0
        self.generation = 0
        """Counts the moves of the region: a graph captured for an older one is captured anew."""

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        """What the kernels of `op` ask of the layout of each input and output. Raises UnsupportedOp."""
        return family_of(op).requirements(op, inputs)

    def bind(self, plan: Plan) -> Executable:
        """Choose, compile and load the kernels of a plan. Raises UnsupportedOp, CompileError, OutOfMemory."""
        with self.lock, self.device.errors(), self.device.current():
            executable = Executable(self, plan)
        self._executables.add(executable)
        return executable

    def resident(self, plan: Plan) -> Resident:
        """The plan with CuPy arrays of its own. Raises as `bind` does."""
        from engine.targets.cuda.resident import ResidentExecutable  # which derives from this module's Executable

        with self.lock, self.device.errors(), self.device.current():
            return ResidentExecutable(self, plan)

    @property
    def context(self) -> Context:
        return Context(self.device.architecture, self.device.multiprocessors, self.weights)

    def constant(self, buffer: Buffer) -> int:
        """The device address of a constant's content, uploaded once."""
        if id(buffer) not in self._constants:
            assert buffer.data is not None, f"{buffer.name} has no content"
            data = np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
            self._constants[id(buffer)] = (buffer, cupy.asarray(data))
        return int(self._constants[id(buffer)][1].data.ptr)

    def reserve(self, region_bytes: int, staging_bytes: int) -> None:
        """Make the shared memory at least this large. The old region is freed first, so that both need not fit."""
        if region_bytes > self.region_bytes:
            self.device.stream.synchronize()
            self._region = None
            self.region_bytes = 0
            self.generation += 1
            self._region = cupy.cuda.alloc(region_bytes)
            self.region_bytes = region_bytes
        if staging_bytes > self.staging_bytes:
            self.device.stream.synchronize()
            self._staging = cupy.cuda.alloc_pinned_memory(staging_bytes)
            self.staging_bytes = staging_bytes

    @property
    def region(self) -> int:
        """The region's address."""
        assert self._region is not None
        return int(self._region.ptr)

    def staging(self, nbytes: int) -> np.ndarray:
        """The first bytes of the pinned staging memory."""
        assert self._staging is not None
        return np.frombuffer(self._staging, np.uint8, nbytes)

    def memory(self) -> Mapping[str, int]:
        """Bytes on the device by kind."""
        weights = sum(array.nbytes for _, array in self._constants.values())
        return {"weights": weights, "arena": self.region_bytes}

    @cached_property
    def device_info(self) -> DeviceInfo:
        """The device with its ceilings, measured once: our fp16 product of 4096³ and a copy of 1 GiB."""
        with self.lock, self.device.errors(), self.device.current():
            flops, nbytes = _measure_ceilings(self)
        return DeviceInfo(
            f"cuda:{self.device.index}", self.device.name, self.device.architecture.name, 0, flops, nbytes
        )

    def close(self) -> None:
        """Give all memory back."""
        with self.lock, self.device.current():
            self.device.stream.synchronize()
            self._constants.clear()
            self._region = None
            self._staging = None
            self.region_bytes = self.staging_bytes = 0
            self.device.close()


class Executable:
    """A plan with its kernels, ready to run. Safe to use from many threads: one run at a time.

    `lowered` gives the launches of each step where the caller has chosen them (a tuner, a test of one tile).
    """

    def __init__(self, target: CudaTarget, plan: Plan, lowered: Sequence[list[Launch]] | None = None) -> None:
        self.plan = plan
        self._target = target
        if lowered is None:
            lowered = [family_of(step.op).lower(step, target.context) for step in plan.steps]
        self._launches: list[tuple[Step, list[Launch]]] = list(zip(plan.steps, lowered, strict=True))
        target.device.load(launch.kernel for _, launches in self._launches for launch in launches)
        # Inputs, outputs, then intermediates; the first two have the same offsets in the pinned memory.
        self._places: dict[int, int] = {}
        self._input_bytes = self._place(plan.inputs, 0)
        self._io_bytes = self._place(plan.outputs, self._input_bytes)
        self._own: dict[int, cupy.ndarray] = {}
        self._stamps = cupy.empty(len(plan.steps) * _STAMP_BYTES, cupy.uint8)
        self._graphs: dict[bool, cupy.cuda.Graph] = {}
        self._generation = -1
        self._runs = 0
        self._samples = 0
        self._nanoseconds = np.zeros(len(plan.steps), np.float64)
        self._arena_bytes = ceildiv(plan.arena_bytes, ALIGNMENT) * ALIGNMENT
        self._workspace_bytes = workspace_bytes(launch for _, launches in self._launches for launch in launches)
        target.reserve(self._io_bytes + self._arena_bytes + self._workspace_bytes, self._io_bytes)

    def _place(self, tensors: Mapping[str, Tensor], start: int) -> int:
        """Give each tensor's buffer an offset from `start` on; returns the end."""
        for tensor in tensors.values():
            self._places[id(tensor.buffer)] = start
            start += ceildiv(max(tensor.nbytes, 1), ALIGNMENT) * ALIGNMENT
        return start

    # Running

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Compute the plan's outputs into the arrays of `outputs`. All arrays are C-contiguous, of the plan's shapes
        and dtypes. Raises ShapeError otherwise, DeviceError where the device fails."""
        _check_arrays(self.plan.inputs, inputs)
        _check_arrays(self.plan.outputs, outputs)
        target, device = self._target, self._target.device
        with target.lock, device.errors(), device.current():
            staging = target.staging(self._io_bytes)
            for name, tensor in self.plan.inputs.items():
                start = self._places[id(tensor.buffer)]
                staging[start : start + tensor.nbytes] = inputs[name].reshape(-1).view(np.uint8)
            stream = device.stream
            self._transfer(target.region, staging.ctypes.data, self._input_bytes, cupy.cuda.runtime.memcpyHostToDevice)
            self.launch()
            start, size = self._input_bytes, self._io_bytes - self._input_bytes
            to, source = staging.ctypes.data + start, target.region + start
            self._transfer(to, source, size, cupy.cuda.runtime.memcpyDeviceToHost)
            stream.synchronize()
            self._collect_stamps()
            for name, tensor in self.plan.outputs.items():
                start = self._places[id(tensor.buffer)]
                outputs[name].reshape(-1).view(np.uint8)[:] = staging[start : start + tensor.nbytes]

    def _transfer(self, to: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes:
            cupy.cuda.runtime.memcpyAsync(to, source, nbytes, kind, self._target.device.stream.ptr)

    def launch(self, stream: cupy.cuda.Stream | None = None) -> None:
        """Queue one run on the inputs as they lie in device memory. `stream`: default, the device's own."""
        self._prepare()
        sampled = self._runs % SAMPLE_EVERY == 1
        self._graphs[sampled].launch(stream or self._target.device.stream)
        self._runs += 1
        self._pending_sample = sampled

    _pending_sample = False

    def _prepare(self) -> None:
        """Capture the graphs, again where the region has moved."""
        target = self._target
        target.reserve(self._io_bytes + self._arena_bytes + self._workspace_bytes, self._io_bytes)
        if self._generation == target.generation:
            return
        self._graphs = {sampled: self._capture(sampled) for sampled in (False, True)}
        cupy.cuda.runtime.deviceSynchronize()  # constants were uploaded on another stream
        self._generation = target.generation

    def _capture(self, stamped: bool) -> cupy.cuda.Graph:
        """All steps as one graph; `stamped`: every step writes its stamp."""
        device = self._target.device
        stream = cupy.cuda.Stream(non_blocking=True)
        prepared = [
            (launch, pack(launch.arguments, self.address, self._encode, self._stamp(i) if stamped else 0))
            for i, (_, launches) in enumerate(self._launches)
            for launch in launches
        ]
        with stream:
            stream.begin_capture()
            if stamped:
                cupy.cuda.runtime.memsetAsync(self._stamps.data.ptr, _STAMP_EMPTY, self._stamps.nbytes, stream.ptr)
            for i, (launch, params) in enumerate(prepared):
                overlap = self._target.overlap and i > 0
                device.launch(launch.kernel, launch.grid, params, stream, overlap)
            return stream.end_capture()

    def _stamp(self, step: int) -> int:
        return int(self._stamps.data.ptr) + step * _STAMP_BYTES

    def _encode(self, map_: TensorMap) -> bytes:
        return self._target.device.encode(map_, self.address(map_.pointer))

    def address(self, pointer: Pointer) -> int:
        """Where a pointer points to on the device."""
        buffer = pointer.buffer
        match buffer.kind:
            case BufferKind.ARENA:
                base = self._target.region + self._io_bytes + buffer.offset
            case BufferKind.INPUT | BufferKind.OUTPUT:
                base = self._target.region + self._places[id(buffer)]
            case BufferKind.WORKSPACE:  # one place for all steps
                base = self._target.region + self._io_bytes + self._arena_bytes
            case BufferKind.CONSTANT:
                base = self._target.constant(buffer)
            case BufferKind.PLAN:
                if id(buffer) not in self._own:
                    assert buffer.data is not None
                    self._own[id(buffer)] = cupy.asarray(np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8))
                base = int(self._own[id(buffer)].data.ptr)
        return int(base) + pointer.offset

    # Figures

    def _collect_stamps(self) -> None:
        """Add up the step times of the run that has just finished, where it was a sampled one."""
        if not self._pending_sample:
            return
        stamps = self._stamps.get().view(np.uint64).reshape(-1, 2)
        begin, end = stamps[:, 0], ~stamps[:, 1]
        self._nanoseconds += np.where(end > begin, end - begin, 0)
        self._samples += 1
        self._pending_sample = False

    def step_stats(self) -> Sequence[StepStat]:
        """Runs and time of every step since it was bound. Times are those of the sampled runs, scaled to all."""
        scale = self._runs / self._samples * 1e-9 if self._samples else 0.0
        return [
            StepStat(
                step.name, launches[0].kernel.family if launches else "none", step.op.name, self._runs,
                float(self._nanoseconds[i]) * scale, step.cost.flops, step.cost.bytes,
            )
            for i, (step, launches) in enumerate(self._launches)
        ]  # fmt: skip

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels launched, in order."""
        return tuple(launch.kernel.source.name for _, launches in self._launches for launch in launches)

    @property
    def nbytes(self) -> int:
        """Memory of this executable beside weights and region: stamps, tensors of sizes, launch arguments."""
        own = sum(int(array.nbytes) for array in self._own.values())
        return int(self._stamps.nbytes) + own + 4096 * len(self._launches)

    def close(self) -> None:
        """Forget the graphs."""
        with self._target.lock:
            self._graphs.clear()
            self._own.clear()
            self._generation = -1


def _check_arrays(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype.numpy or not array.flags.c_contiguous:
            raise ShapeError(
                f"{name!r}: expected a C-contiguous {tensor.dtype.value} array of shape {list(tensor.shape)}, "
                f"got {array.dtype} of shape {list(array.shape)}"
            )


def _measure_ceilings(target: CudaTarget) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this device as it runs now: the best of a few tries."""
    from engine.targets.cuda.covering import ACC, make_step, stored

    n, repeats = 4096, 5
    step = make_step(Gemm((stored(ACC),)), [(DType.F16, (n, n)), (DType.F16, (n, n))])
    buffers = tuple(tensor.buffer for tensor in (*step.inputs, *step.outputs))
    names = [f"operand{i}" for i in range(2)]
    plan = Plan({}, (step,), dict(zip(names, step.inputs, strict=True)), {"product": step.outputs[0]}, buffers, 0, 0)
    executable = Executable(target, plan)
    stream = target.device.stream
    rng = cupy.random.default_rng(0)
    with stream:
        for pointer, tensor in ((Pointer(t.buffer), t) for t in step.inputs):
            memory = cupy.cuda.UnownedMemory(executable.address(pointer), tensor.nbytes, target)
            view = cupy.ndarray(tensor.shape, cupy.float16, cupy.cuda.MemoryPointer(memory, 0))
            view[...] = rng.standard_normal(prod(tensor.shape), dtype=cupy.float32).reshape(tensor.shape)
        source = cupy.empty(1 << 29, cupy.uint8)
        copy = cupy.empty_like(source)
        seconds = [_seconds(stream, executable.launch) for _ in range(repeats)]
        copies = [_seconds(stream, lambda: cupy.copyto(copy, source)) for _ in range(repeats)]
    executable.close()
    return 2 * n**3 / min(seconds[1:]), 2 * source.nbytes / min(copies[1:])


def _seconds(stream: cupy.cuda.Stream, work: object) -> float:
    assert callable(work)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3


__all__ = ["CudaTarget", "DeviceError", "Executable"]
