"""The part of CuPy that the CUDA target uses, on the host, with real asynchrony: the runtime's tests without a GPU.

Streams are threads that work off their queues after random pauses, in no order but the one that events ask for. Device
memory is host memory of limited size; freed memory is overwritten and never handed out again, so that a graph or a copy
that comes too late, or too early, shows as wrong numbers. Kernels are steps of a plan, computed by the interpreter.
"""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from engine.ir import ops
from engine.ir.graph import Node
from engine.plan.plan import Step
from engine.plan.tensor import Buffer
from engine.targets.cuda import device, executable, host_step, memory, program, resident, target
from engine.targets.cuda.compiler import Source
from engine.targets.cuda.kernel import Kernel, Launch, Pointer, StatusWord
from tests.engine import ir_interpreter
from tests.engine.plan.executor import AnyLayout, window

FREED = 0xDD
Work = Callable[[], None]


class FakeGpu:
    """One GPU of `capacity` bytes. Tests hold kernels back with `gate`, and read `log`: (what, detail) of every
    operation that has ended."""

    def __init__(self, capacity: int = 1 << 30, pause: float = 3e-4) -> None:
        self.capacity, self.pause = capacity, pause
        self.used = 0
        self.allocations = 0
        self.captures = 0
        self.gate = threading.Event()
        self.gate.set()
        self.computing = threading.Semaphore(0)
        """Released when a graph begins to compute."""
        self.log: list[tuple[str, int]] = []
        self.lost = False
        self.failures: list[int] = []
        """Status codes with which the next graph launches fail."""
        self.stream_threads: list[queue.SimpleQueue[Work | None]] = []
        self.streams: dict[int, FakeStream] = {}
        self.live: dict[int, int] = {}
        """Bytes of every piece of device memory, by address."""
        self.graveyard: list[np.ndarray] = []
        self.violations: list[str] = []
        self.steps: dict[Source, tuple[Step, list[Buffer]]] = {}
        self.only_stamp: set[Source] = set()
        """Kernels that are no step of a plan."""
        self.profiling = False
        self.profiled: list[FakeKernelTime] = []
        """Every kernel launched while a profiler was on, in that order."""
        self.null = FakeStream(self)

    def check(self) -> None:
        """What every call of the driver does first."""
        if self.lost:
            raise cupy.cuda.runtime.CUDARuntimeError(700)

    def close(self) -> None:
        self.gate.set()
        for work in self.stream_threads:
            work.put(None)

    def touch(self, address: int, nbytes: int, what: str) -> None:
        """Something reads or writes device memory: it must be there."""
        places = list(self.live.items())
        if not any(start <= address and address + nbytes <= start + size for start, size in places):
            self.violations.append(f"{what} touches {nbytes} bytes of freed memory")

    # cupy

    def namespace(self) -> Any:
        """In place of the module `cupy`."""
        gpu = self

        class Stream(FakeStream):
            def __init__(self, non_blocking: bool = False) -> None:
                super().__init__(gpu)

        pool = SimpleNamespace(free_all_blocks=self.check)
        cuda = SimpleNamespace(
            Stream=Stream,
            ExternalStream=FakeStream,
            Event=lambda block=False, disable_timing=False: FakeEvent(self, block),
            Device=lambda index: nullcontext(),
            Graph=FakeGraph,
            MemoryPointer=FakeMemory,
            alloc=lambda nbytes: FakeMemory(self, nbytes),
            alloc_pinned_memory=self._pinned,
            get_current_stream=lambda: self.null,
            memory=cupy.cuda.memory,
            driver=cupy.cuda.driver,
            runtime=SimpleNamespace(
                CUDARuntimeError=cupy.cuda.runtime.CUDARuntimeError,
                memcpyAsync=self._memcpy,
                memsetAsync=self._memset,
                memcpyHostToDevice=1,
                memcpyDeviceToHost=2,
                deviceSynchronize=self._synchronize,
                profilerStart=lambda: setattr(self, "profiling", True),
                profilerStop=lambda: setattr(self, "profiling", False),
            ),
        )
        return SimpleNamespace(
            cuda=cuda,
            ndarray=FakeArray,
            asarray=lambda data: FakeArray(self, data),
            zeros=lambda shape, dtype: FakeArray(self, np.zeros(shape, dtype)),
            get_default_memory_pool=lambda: pool,
            get_default_pinned_memory_pool=lambda: pool,
        )

    def _synchronize(self) -> None:
        self.check()
        for stream in list(self.streams.values()):
            stream.synchronize()

    def _pinned(self, nbytes: int) -> np.ndarray:
        self.check()
        self.allocations += 1
        return np.full(nbytes, FREED, np.uint8)

    def _memcpy(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self.check()
        name = {1: "in", 2: "out"}[kind]

        def copy() -> None:
            self.touch(to if kind == 1 else source, nbytes, f"a copy {name}")
            ctypes.memmove(to, source, nbytes)
            self.log.append((name, nbytes))

        self.streams[stream].enqueue(copy)

    def _memset(self, to: int, value: int, nbytes: int, stream: int) -> None:
        self.check()
        self.streams[stream].enqueue(lambda: ctypes.memset(to, value, nbytes))

    # kernels

    def family(self, op: ops.Op) -> Any:
        """In place of `family_of`: every operator, in any layout, one launch a step."""
        return SimpleNamespace(requirements=AnyLayout().requirements, lower=self._lower)

    def _lower(self, step: Step, context: object) -> list[Launch]:
        buffers = list(dict.fromkeys(tensor.buffer for tensor in (*step.inputs, *step.outputs)))
        source = Source(f"{step.name}/{len(self.steps)}", "")
        self.steps[source] = (step, buffers)
        arguments: list[tuple[str, Any]] = [(f"b{i}", Pointer(buffer)) for i, buffer in enumerate(buffers)]
        if _lookups(step.op):
            arguments.append(("status", StatusWord()))
        return [Launch(Kernel(step.op.name.lower(), source, 1), (1, 1, 1), tuple(arguments))]

    def launched(self, kernel: Kernel, grid: tuple[int, int, int], params: bytes) -> Work:
        """What is queued for a kernel."""
        if not self.profiling:
            return lambda: self._run_kernel(kernel.source, params)
        entry = FakeKernelTime(grid, kernel.threads)
        self.profiled.append(entry)

        def work() -> None:
            self._run_kernel(kernel.source, params)
            stamped = bytes_at(int(np.frombuffer(params, np.uint64)[-1]), 16).view(np.uint64)
            entry.nanoseconds = int(~stamped[1] - stamped[0])

        return work

    def _run_kernel(self, source: Source, params: bytes) -> None:
        """Compute a step where `params` says."""
        words = np.frombuffer(params, np.uint64).tolist()
        begin = time.perf_counter_ns()
        if source not in self.only_stamp:
            begin = self._compute(source, words)
        if words[-1]:
            stamp = bytes_at(words[-1], 16).view(np.uint64)
            stamp[:] = np.minimum(stamp, np.array([begin, ~np.uint64(time.perf_counter_ns())], np.uint64))

    def _compute(self, source: Source, words: list[int]) -> int:
        """A step; when it began."""
        step, buffers = self.steps[source]
        status = words[len(buffers)] if _lookups(step.op) else 0
        self._touch_all(step, buffers, words)
        begin = time.perf_counter_ns()
        places = {buffer: bytes_at(word, buffer.nbytes) for buffer, word in zip(buffers, words, strict=False)}
        inputs = [window(tensor, places).copy() for tensor in step.inputs]
        for table, index, axis in _lookups(step.op):
            rows = inputs[table].shape[axis]
            wrong = (inputs[index] < -rows) | (inputs[index] >= rows)
            inputs[index][wrong] = 0
            if wrong.any() and status:
                bytes_at(status, 4).view(np.uint32)[0] = 1
        results = ir_interpreter.run_node(Node(step.op, (), (), step.name), inputs, {})
        for tensor, result in zip(step.outputs, results, strict=True):
            window(tensor, places)[...] = result
        self._touch_all(step, buffers, words)  # nor may it be freed while it is in use
        return begin

    def _touch_all(self, step: Step, buffers: list[Buffer], words: list[int]) -> None:
        for buffer, word in zip(buffers, words, strict=False):
            self.touch(word, buffer.nbytes, f"{step.name} ({buffer.kind.value})")


@dataclass
class FakeKernelTime:
    """A kernel's shape, and the time from its start to its end. Of kernels that write stamps."""

    grid: tuple[int, int, int]
    threads: int
    nanoseconds: int = 0


def _lookups(op: ops.Op) -> list[tuple[int, int, int]]:
    if isinstance(op, ops.Gather):
        return [(0, 1, op.axis)]
    return [(table, index, 0) for table, index in getattr(op, "gathers", ())]


def bytes_at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))


class FakeMemory:
    """A piece of device memory."""

    def __init__(self, gpu: FakeGpu, nbytes: int) -> None:
        gpu.check()
        self._gpu, self.nbytes = gpu, 0
        if gpu.used + nbytes > gpu.capacity:
            raise cupy.cuda.memory.OutOfMemoryError(nbytes, gpu.used, 0)
        self.nbytes = nbytes
        gpu.used += nbytes
        gpu.allocations += 1
        self.block = np.full(nbytes + 512, FREED, np.uint8)
        self.ptr = -(-self.block.ctypes.data // 256) * 256
        gpu.live[self.ptr] = nbytes

    def __del__(self) -> None:
        if self.nbytes:
            self._gpu.used -= self.nbytes
            del self._gpu.live[self.ptr]
            self.block[:] = FREED
            self._gpu.graveyard.append(self.block)


class FakeArray:
    """A CuPy array, as far as it goes. Its content changes at once, not in the order of a stream."""

    def __init__(self, gpu: FakeGpu, content: np.ndarray) -> None:
        self.data = FakeMemory(gpu, max(content.nbytes, 1))
        self.shape, self.dtype, self.nbytes = content.shape, content.dtype, content.nbytes
        self.set(content)

    def set(self, content: np.ndarray) -> None:
        bytes_at(self.data.ptr, self.nbytes)[:] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)

    def get(self) -> np.ndarray:
        return bytes_at(self.data.ptr, self.nbytes).copy().view(self.dtype).reshape(self.shape)


class FakeStream:
    """A thread that works off what is queued, once there is something."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.ptr = id(self)
        gpu.streams[self.ptr] = self
        self._work: queue.SimpleQueue[Work | None] | None = None
        self._starting = threading.Lock()
        self.captured: list[Work] | None = None

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def enqueue(self, work: Work) -> None:
        if self.captured is not None:
            self.captured.append(work)
            return
        with self._starting:
            if self._work is None:
                self._work = queue.SimpleQueue()
                self._gpu.stream_threads.append(self._work)
                threading.Thread(target=self._serve, args=(self._work,), daemon=True).start()
        self._work.put(work)

    def _serve(self, every: queue.SimpleQueue[Work | None]) -> None:
        rng = random.Random(self.ptr)
        while (work := every.get()) is not None:
            time.sleep(rng.random() * self._gpu.pause)
            work()

    def begin_capture(self) -> None:
        assert self.captured is None, "captures already"
        self._gpu.check()
        self.captured = []

    def end_capture(self) -> FakeGraph:
        assert self.captured is not None, "does not capture"
        works, self.captured = self.captured, None
        self._gpu.captures += 1
        return FakeGraph(self._gpu, works)

    def wait_event(self, event: FakeEvent) -> None:
        self._gpu.check()
        ticket = event.ticket
        self.enqueue(lambda: _wait(ticket))

    def synchronize(self) -> None:
        event = FakeEvent(self._gpu, True)
        event.record(self)
        event.synchronize()


class FakeEvent:
    def __init__(self, gpu: FakeGpu, block: bool) -> None:
        self._gpu, self.block = gpu, block
        self.ticket = threading.Event()
        self.ticket.set()

    def record(self, stream: FakeStream) -> None:
        self._gpu.check()
        ticket = self.ticket = threading.Event()
        stream.enqueue(ticket.set)

    def synchronize(self) -> None:
        self._gpu.check()
        assert self.block, "a thread would spin on this event"
        _wait(self.ticket)
        self._gpu.check()

    @property
    def done(self) -> bool:
        return self.ticket.is_set()


def _wait(ticket: threading.Event) -> None:
    assert ticket.wait(20), "an event never came"


class FakeGraph:
    def __init__(self, gpu: FakeGpu, works: list[Work]) -> None:
        self._gpu, self._works = gpu, works
        self._launched = threading.Lock()

    def launch(self, stream: FakeStream) -> None:
        self._gpu.check()
        if self._gpu.failures:
            raise cupy.cuda.runtime.CUDARuntimeError(self._gpu.failures.pop(0))
        stream.enqueue(self._run)

    def _run(self) -> None:
        assert self._launched.acquire(blocking=False), "a graph runs twice at once"
        self._gpu.computing.release()
        self._gpu.log.append(("begin", id(self)))
        assert self._gpu.gate.wait(20), "the test never opened the gate"
        for work in self._works:
            work()
        self._gpu.log.append(("end", id(self)))
        self._launched.release()


class _FakeDevice(device.Device):
    """The real error handling on a fake driver."""

    gpu: FakeGpu

    def __init__(self, index: int = 0, cache: object = None) -> None:
        self.index, self.name, self.multiprocessors = index, "fake", 1
        self.architecture = device.for_capability(9, 0)
        self.cache_bytes = 1 << 20
        self.stream = FakeStream(self.gpu)

    def load(self, kernels: Any) -> None:
        for kernel in kernels:
            assert kernel.source in self.gpu.steps or kernel.source in self.gpu.only_stamp

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], params: bytes, stream: FakeStream, overlap: bool
    ) -> None:
        stream.enqueue(self.gpu.launched(kernel, grid, params))

    def close(self) -> None:
        pass


@contextmanager
def fake_gpu(monkeypatch: Any, capacity: int = 1 << 30) -> Iterator[FakeGpu]:
    """The CUDA target on a fake GPU."""
    gpu = FakeGpu(capacity)
    namespace = gpu.namespace()
    for module in (device, executable, host_step, memory, program, resident, target):
        monkeypatch.setattr(module, "cupy", namespace)
    for module in (program, target):
        monkeypatch.setattr(module, "family_of", gpu.family)
    monkeypatch.setattr(target, "Device", type("Device", (_FakeDevice,), {"gpu": gpu}))
    yield gpu
    gpu.close()
    assert not gpu.violations, gpu.violations[:5]
