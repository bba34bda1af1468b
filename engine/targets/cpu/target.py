"""The CPU target: binds plans to kernels and memory, and runs them.

A `CpuTarget` belongs to one model: it owns the arenas that its plans share and the packed weights. The thread pool and
the compiled kernels are the process's. A run has the whole pool and the model's arena for itself, or, side by side with
another, a part of the pool and the arena that belongs to that part.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np

from engine.background import in_background
from engine.errors import DeviceError, OutOfMemory, ShapeError
from engine.ir.dtype import DType
from engine.ir.ops import Cost, Op, Opaque
from engine.passes.traits import PackedAttention, Traits
from engine.plan.plan import Plan, Requirement, Step
from engine.plan.residency import cached_bytes
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.specs import DeviceInfo, StepStat, TileTrial
from engine.targets.cpu.ceilings import ceilings, processor_name
from engine.targets.cpu.codegen.isa import host_isa
from engine.targets.cpu.families import family_of
from engine.targets.cpu.kernel import Context, Launch, Pointer, WeightStore, aligned_copy
from engine.targets.cpu.pieces import in_pieces
from engine.targets.cpu.runtime import PARTS, Part, Pool, Program, address, aligned_bytes, available_cores, pool
from engine.targets.cpu.system import cache_bytes, return_free_memory, usable_memory_bytes
from engine.targets.host import HostOperator, HostResident

_FACTS_BYTES = 400
"""Python objects that stay for each step: facts, names and numbers (measured with tracemalloc)."""
_BASE_BYTES = 6000
"""The same for each plan, whatever its steps."""


@dataclass
class Arena:
    """Memory for the intermediates of the plan that runs. Grows to the largest plan; `release` gives it back."""

    memory: np.ndarray = field(default_factory=lambda: aligned_bytes(0))
    address: int = 0
    """Of `memory`, where it has bytes."""

    def at_least(self, nbytes: int) -> np.ndarray:
        if self.memory.nbytes < nbytes:
            try:
                if nbytes > usable_memory_bytes():
                    raise MemoryError
                self.memory = aligned_bytes(nbytes)
                self.address = address(self.memory)
            except MemoryError:
                raise OutOfMemory(f"the intermediates need {nbytes} bytes; use a smaller batch or sequence") from None
        return self.memory


class CpuTarget:
    """Runs plans on the processor with `threads` threads (default: the cores this process may use)."""

    traits = Traits(
        channels_last=True,
        float_types=frozenset({DType.F32, DType.F64}),
        attention_types=frozenset({DType.F32}),
        packed=PackedAttention(frozenset({DType.F32})),
    )

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.isa = host_isa()
        self.threads = threads or available_cores()
        self.weights = WeightStore()
        self.arena = Arena()
        self.lock = threading.Lock()  # of the arena: one plan of a model runs at a time with the whole pool
        self.part_arenas = _arenas_of_parts()

    def part_threads(self, number: int) -> int:
        """Of a part of the pool: together the parts have all."""
        return max(1, self.threads // PARTS + (number < self.threads % PARTS))

    @property
    def concurrent_runs(self) -> int:
        """As many as there are parts of the pool, where there are threads for them."""
        return PARTS if self.threads >= PARTS else 1

    @property
    def divides_threads(self) -> bool:
        """Where there are several."""
        return self.concurrent_runs > 1

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of the last-level caches of as many cores as there are threads."""
        return cache_bytes(self.threads)

    @cached_property
    def device_info(self) -> DeviceInfo:
        """The processor and its ceilings, measured on first use."""
        found = ceilings(self.isa, self.threads)
        return DeviceInfo(
            "cpu", processor_name(), self.isa.name, self.threads, found.flops, found.bytes, self.cache_bytes,
            found.cached_bytes,
        )  # fmt: skip

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        """What the kernels of `op` ask of the layout of each input and output. Raises UnsupportedOp."""
        return family_of(op).requirements(op, inputs)

    def bind(self, plan: Plan) -> CpuExecutable:
        """Choose and compile the kernels of a plan. Raises UnsupportedOp where a step has none."""
        return CpuExecutable(self, plan)

    def resident(self, plan: Plan) -> HostResident:
        """The plan with arrays of its own."""
        return HostResident(plan, self.bind(plan))

    def trials(self, plan: Plan, timed: bool, deadline: float) -> Iterator[TileTrial]:
        """Raises DeviceError: the kernels of a CPU have one way to run."""
        raise DeviceError("there is nothing to choose on a CPU: tuning is for GPUs. Use device='cuda'")

    def memory(self) -> Mapping[str, int]:
        """Bytes by kind."""
        arenas = (self.arena, *self.part_arenas)
        return {"weights": self.weights.nbytes, "arena": sum(arena.memory.nbytes for arena in arenas)}

    def close(self) -> None:
        """Give arenas and packed weights back. Executables of this target must not run afterwards."""
        self.weights = WeightStore()
        self.arena, self.part_arenas = Arena(), _arenas_of_parts()
        return_free_memory()


def _arenas_of_parts() -> tuple[Arena, ...]:
    return tuple(Arena() for _ in range(PARTS))


_FEW = 16  # pointers that are filled in faster one by one than by NumPy


class CpuExecutable:
    """A plan with its kernels, ready to run. Safe to use from many threads: one run at a time, or one in each part of
    the pool. Steps on the host run one at a time in any case."""

    def __init__(self, target: CpuTarget, plan: Plan) -> None:
        self._target = target
        self._places = _Places(plan)
        pieces = in_pieces(plan)
        plan, self._pieces = pieces.plan, pieces.count
        _check_memory(plan)
        self._arena_bytes = plan.arena_bytes
        self._cached_bytes = cached_bytes(plan, target.cache_bytes)
        context = Context(target.isa, target.threads, target.weights)
        self._kernels: list[str] = []
        self._sections: list[_Native | _Host] = []
        for on_host, steps in groupby(plan.steps, _is_on_host):
            if on_host:
                for step in steps:
                    self._kernels.append("host")
                    self._sections.append(_Host(step, self._places))
                continue
            group = list(steps)
            launches = [family_of(step.op).lower(step, context) for step in group]
            self._kernels.extend(row[0].spec.family if row else "none" for row in launches)
            self._sections.append(_Native(group, launches, target.threads, self._places))
        self._is_native = all(isinstance(section, _Native) for section in self._sections)
        self._in_parts: dict[int, _InPart] = {}
        """By the number of the part of the pool, from the first run in it on."""

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], side_by_side: bool = False
    ) -> None:
        """Compute the plan's outputs into the arrays of `outputs`. All arrays are C-contiguous, of the plan's shapes
        and dtypes. Raises ShapeError otherwise, and for an index out of range."""
        if side_by_side and self._is_native and self._target.divides_threads and not in_background():
            with pool().part() as part, self._in_part(part.number).counted(part) as sections:
                self._run(sections, part.pool, self._target.part_arenas[part.number], inputs, outputs)
        else:
            with self._target.lock:
                self._run(self._sections, pool(), self._target.arena, inputs, outputs)

    def _in_part(self, number: int) -> _InPart:
        if number not in self._in_parts:
            threads = self._target.part_threads(number)
            native = (section for section in self._sections if isinstance(section, _Native))
            self._in_parts[number] = _InPart([section.on(threads) for section in native])
        return self._in_parts[number]

    def _run(
        self,
        sections: Sequence[_Native | _Host],
        workers: Pool,
        arena: Arena,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        arrays = self._places.bases(arena.at_least(self._arena_bytes), inputs, outputs)
        addresses = [arena.address, *map(address, arrays[1:])]
        for piece in range(self._pieces):
            if piece:  # from piece to piece the inputs and outputs move on; the arena is used again
                for i in range(1, len(arrays)):
                    addresses[i] += arrays[i].nbytes // self._pieces
            for section in sections:
                if isinstance(section, _Native):
                    section.run(workers, addresses)
                else:
                    section.run(arrays)

    def step_stats(self) -> Sequence[StepStat]:
        """Runs and time of every step since it was bound, in the plan's order. Time is that of the whole pool: while
        two runs go on, each in its part, a second counts half for either."""
        rows = _rows(self._sections)
        runs, nanoseconds = [count for _, count, _ in rows], [float(spent) for _, _, spent in rows]
        for part in list(self._in_parts.values()):
            for i, ((_, count, _), spent) in enumerate(zip(_rows(part.sections), part.nanoseconds, strict=True)):
                runs[i] += count
                nanoseconds[i] += float(spent)
        return [
            StepStat(step.name, kernel, step.op, count, spent * 1e-9, step.cost.flops, step.cost.bytes, cached)
            for (step, _, _), count, spent, kernel, cached in zip(
                rows, runs, nanoseconds, self._kernels, self._cached_bytes, strict=True
            )
        ]

    @property
    def nbytes(self) -> int:
        """Memory of this executable beside weights and arenas, once it has run in every part."""
        native = [section for section in self._sections if isinstance(section, _Native)]
        tables = sum(section.table_bytes for section in native)
        if self._is_native and self._target.divides_threads:
            tables *= 1 + PARTS
        return tables + sum(section.facts_bytes for section in native) + self._places.nbytes + _BASE_BYTES

    def close(self) -> None:
        """Give its memory back."""
        self._sections, self._in_parts = [], {}


def _rows(sections: Sequence[_Native | _Host]) -> list[tuple[_Facts, int, int]]:
    """Facts, runs and nanoseconds of every step."""
    return [row for section in sections for row in section.rows()]


def _check_memory(plan: Plan) -> None:
    """Raises OutOfMemory for a plan whose results and intermediates are not for this machine."""
    needed = {name: tensor.elements * tensor.dtype.itemsize for name, tensor in plan.outputs.items()}
    memory = usable_memory_bytes()
    if sum(needed.values()) + plan.arena_bytes > memory:
        name = max(needed, key=lambda name: needed[name])
        raise OutOfMemory(
            f"output {name!r} of shape {list(plan.outputs[name].shape)} has {needed[name]} bytes; with all outputs and "
            f"{plan.arena_bytes} bytes of intermediates that is more than a run may take: {memory}, half of the "
            "machine's memory; use smaller sizes"
        )


class _Places:
    """Where buffers live: constants stay where they are, the others are relative to a base that a run supplies.

    Base 0 is the arena; the inputs and outputs of the plan follow.
    """

    def __init__(self, plan: Plan) -> None:
        # A piece of the plan has tensors of its own but shares these buffers.
        tensors = [*plan.inputs.items(), *plan.outputs.items()]
        self._tensors = [(name, tensor.shape, tensor.dtype.numpy) for name, tensor in tensors]
        self._inputs = len(plan.inputs)
        self._base = {id(tensor.buffer): i for i, (_, tensor) in enumerate(tensors, start=1)}
        self._kept: dict[int, np.ndarray] = {}
        self._table_bytes = 0

    def locate(self, buffer: Buffer) -> tuple[int | None, int]:
        """(base, offset in bytes) of a buffer; base None: the offset is an address."""
        if buffer.kind is BufferKind.ARENA:
            return 0, buffer.offset
        if buffer.kind in (BufferKind.INPUT, BufferKind.OUTPUT):
            return self._base[id(buffer)], 0
        return None, address(self.content(buffer))

    def content(self, buffer: Buffer) -> np.ndarray:
        """The content of a constant buffer, kept alive and aligned for its element type."""
        if id(buffer) not in self._kept:
            data = buffer.data
            assert data is not None, f"{buffer.name} has no content"
            whole = data.flags.c_contiguous and data.flags.aligned
            self._kept[id(buffer)] = data if whole else aligned_copy(data)
            self._table_bytes += data.nbytes if buffer.kind is BufferKind.PLAN else 0
        return self._kept[id(buffer)]

    def strings(self, tensor: Tensor, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """A tensor of strings: Python objects, which cannot lie in the arena."""
        buffer = tensor.buffer
        if buffer.kind is BufferKind.ARENA:
            memory = self._kept.setdefault(id(buffer), np.empty(buffer.nbytes // tensor.dtype.itemsize, object))
        else:
            memory = self.content(buffer) if buffer.data is not None else arrays[self._base[id(buffer)]]
        strides = tuple(stride * memory.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(memory.reshape(-1)[tensor.offset :], tensor.shape, strides)

    def bases(
        self, arena: np.ndarray, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """The arrays of all bases for one run, checked."""
        arrays = [arena]
        for i, (name, shape, dtype) in enumerate(self._tensors):
            array = (inputs if i < self._inputs else outputs)[name]
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ShapeError(
                    f"{name!r}: expected a C-contiguous {dtype} array of shape {list(shape)}, "
                    f"got {array.dtype} of shape {list(array.shape)}"
                )
            arrays.append(array)
        return arrays

    @property
    def nbytes(self) -> int:
        """Memory of the small tables that belong to the plan alone."""
        return self._table_bytes


@dataclass(frozen=True, slots=True)
class _Facts:
    """What remains of a step when it is bound: its name, its operator's name, its cost."""

    name: str
    op: str
    cost: Cost

    @classmethod
    def of(cls, step: Step) -> _Facts:
        return cls(step.name, step.op.name, step.cost)


class _Native:
    """Consecutive steps that run as one native call."""

    def __init__(
        self, steps: Sequence[Step], launches: Sequence[Sequence[Launch]], threads: int, places: _Places
    ) -> None:
        self.steps = [_Facts.of(step) for step in steps]
        self.program = Program(launches, threads)
        self.program.prepare()
        moving: list[tuple[int, int, int]] = []
        for slot, pointer in zip(self.program.pointer_slots, self.program.pointers, strict=True):
            base, offset = _place(pointer, places)
            if base is None:
                self.program.slots[slot] = offset
            else:
                moving.append((int(slot), base, offset))
        columns = np.asarray(moving, np.int64).reshape(-1, 3)
        self._slots, self._bases, self._offsets = (np.ascontiguousarray(column) for column in columns.T)
        self._few = moving if len(moving) <= _FEW else None
        self._addresses: tuple[int, ...] | None = None
        self._all_well = bytes(self.program.status.nbytes)
        self.program.forget_sources()

    def on(self, threads: int) -> _Native:
        """The same steps on at most so many threads; may run beside this one."""
        other = copy.copy(self)
        other.program = self.program.on(threads)
        other._addresses = None
        return other

    @property
    def nanoseconds(self) -> np.ndarray:
        """What each step has taken so far."""
        return self.program.statistics.reshape(-1, 2)[: len(self.steps), 1]

    def run(self, workers: Pool, addresses: Sequence[int]) -> None:
        """Run with arena, inputs and outputs at `addresses`."""
        current = tuple(addresses)
        if current != self._addresses:
            if self._few is None:
                self.program.slots[self._slots] = np.asarray(addresses, np.int64)[self._bases] + self._offsets
            else:
                for slot, base, offset in self._few:
                    self.program.slots[slot] = addresses[base] + offset
            self._addresses = current
        workers.run(self.program)
        if self.program.status.tobytes() != self._all_well:
            wrong = self.steps[int(self.program.status.argmax())].name
            self.program.status[:] = 0
            raise ShapeError(f"step {wrong!r}: an index is out of range for the table that it looks up")

    @property
    def table_bytes(self) -> int:
        """Memory of the program's tables."""
        return self.program.nbytes

    @property
    def facts_bytes(self) -> int:
        """Memory of what says which addresses move, and of the facts of the steps."""
        moving = self._slots.nbytes + self._bases.nbytes + self._offsets.nbytes
        return moving + _FACTS_BYTES * len(self.steps)

    def rows(self) -> Iterable[tuple[_Facts, int, int]]:
        statistics = self.program.statistics.reshape(-1, 2)
        return [(step, int(runs), int(spent)) for step, (runs, spent) in zip(self.steps, statistics, strict=False)]


class _InPart:
    """The sections of a plan for a part of the pool, and what each step's `nanoseconds` in it count of the whole
    pool's. Whoever has the part runs them."""

    def __init__(self, sections: Sequence[_Native]) -> None:
        self.sections = sections
        self.nanoseconds = np.zeros(sum(len(section.steps) for section in sections))

    @contextmanager
    def counted(self, part: Part) -> Iterator[Sequence[_Native]]:
        """The sections, for one run."""
        before = self._spent()
        try:
            yield self.sections
        finally:
            self.nanoseconds += part.share() * (self._spent() - before)

    def _spent(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(section.nanoseconds for section in self.sections)])


def _place(pointer: Pointer, places: _Places) -> tuple[int | None, int]:
    base, offset = places.locate(pointer.buffer)
    return base, offset + pointer.offset


def _is_on_host(step: Step) -> bool:
    """Whether no kernel computes a step. Strings are Python objects: the plan copies them, all else is `Opaque`."""
    return isinstance(step.op, Opaque) or step.outputs[0].dtype is DType.STRING


def _copy(inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return inputs


class _Host:
    """A step that Python computes on views of the plan's memory."""

    def __init__(self, step: Step, places: _Places) -> None:
        self._compute = HostOperator(step.op).run if isinstance(step.op, Opaque) else _copy
        self._step, self._places = step, places
        self._runs = 0
        self._nanoseconds = 0

    def run(self, arrays: Sequence[np.ndarray]) -> None:
        start = time.perf_counter_ns()
        results = self._compute([self._view(tensor, arrays) for tensor in self._step.inputs])
        for tensor, result in zip(self._step.outputs, results, strict=True):
            self._view(tensor, arrays)[...] = result
        self._runs += 1
        self._nanoseconds += time.perf_counter_ns() - start

    def _view(self, tensor: Tensor, arrays: Sequence[np.ndarray]) -> np.ndarray:
        if tensor.dtype is DType.STRING:
            return self._places.strings(tensor, arrays)
        base, offset = self._places.locate(tensor.buffer)
        memory = self._places.content(tensor.buffer) if base is None else arrays[base]
        start = (0 if base is None else offset) + tensor.offset * tensor.dtype.itemsize
        itemsize = tensor.dtype.itemsize
        first = memory.reshape(-1).view(np.uint8)[start : start + itemsize].view(tensor.dtype.numpy)
        strides = tuple(stride * itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(first, tensor.shape, strides)

    def rows(self) -> Iterable[tuple[_Facts, int, int]]:
        return [(_Facts.of(self._step), self._runs, self._nanoseconds)]
