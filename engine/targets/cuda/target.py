"""The CUDA target: binds plans to kernels and memory on one GPU.

A `CudaTarget` belongs to one model. It owns the device's copy of the weights and the memory that all its plans share:
the arena of their intermediates, one plan computing at a time, and the staging slots of the runs under way (memory.py
says why so). A run (executable.py) copies feeds to pinned memory, and queues a transfer in, a graph and a transfer out;
nothing is allocated on that path once a plan has run on both slots.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import cupy
import numpy as np

from engine.cache_folder import cache_folder
from engine.errors import OutOfMemory
from engine.ir.ops import Op
from engine.passes.traits import Traits
from engine.plan.plan import Plan, Requirement
from engine.plan.tensor import Buffer, Tensor
from engine.specs import DeviceInfo, TileTrial
from engine.targets.base import Resident
from engine.targets.cuda import probe
from engine.targets.cuda.ceilings import measure_ceilings
from engine.targets.cuda.choice_file import ChoiceFile
from engine.targets.cuda.device import Device
from engine.targets.cuda.executable import Executable
from engine.targets.cuda.families import TRAITS, family_of, traits_of
from engine.targets.cuda.kernel import Choice, Context, WeightStore
from engine.targets.cuda.memory import SLOTS, Slot, Slots, device_memory
from engine.targets.cuda.program import SAMPLE_EVERY, SAMPLE_SECONDS
from engine.targets.cuda.resident import ResidentExecutable


class CudaTarget:
    """Runs plans on GPU number `index`. `overlap` lets kernels start while the one before drains, where the GPU can;
    `tf32` lets products of fp32 operands round them to tf32.

    `lock` covers the arena, the weights, and everything that is queued on the device's stream. Whoever holds it waits
    for nothing but the device.
    """

    traits: Traits = TRAITS
    concurrent_runs = SLOTS
    divides_threads = False

    def __init__(self, index: int = 0, cache: Path | None = None, overlap: bool = True, tf32: bool = False) -> None:
        self.device = Device(index, cache)
        self.overlap = overlap and self.device.architecture.dependent_launch
        self.traits = traits_of(self.device.architecture)
        self.tf32 = tf32
        self.sample_every = SAMPLE_EVERY
        self.sample_seconds = SAMPLE_SECONDS
        """A run writes time stamps where so many runs, and about so many seconds, have gone since the last that did.
        With `sample_every` 0 none does; with `sample_seconds` 0 it is one run in so many."""
        self.weights = WeightStore()
        self.lock = threading.RLock()
        self._choice_file = ChoiceFile(cache_folder("tiles"), self.device.name, probe.driver_version())
        self.choices = self._choice_file.read()
        self._constants: dict[int, tuple[Buffer, cupy.ndarray]] = {}
        self._arena = device_memory()
        with self.device.errors(), self.device.current():
            self.copy_in = cupy.cuda.Stream(non_blocking=True)
            self.copy_out = cupy.cuda.Stream(non_blocking=True)
            self.slots = Slots(tuple(Slot(i) for i in range(SLOTS)))

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        """What the kernels of `op` ask of the layout of each input and output. Raises UnsupportedOp."""
        return family_of(op).requirements(op, inputs)

    def bind(self, plan: Plan) -> Executable:
        """Choose, compile and load the kernels of a plan. Raises UnsupportedOp, CompileError, OutOfMemory."""
        with self.lock, self.device.errors(), self.device.current():
            return Executable(self, plan)

    def resident(self, plan: Plan) -> Resident:
        """The plan with CuPy arrays of its own. Raises as `bind` does."""
        with self.lock, self.device.errors(), self.device.current():
            return ResidentExecutable(self, plan)

    @property
    def context(self) -> Context:
        device = self.device
        return Context(device.architecture, device.multiprocessors, self.weights, self.tf32, self.choices)

    def keep_choices(self, found: Mapping[str, Choice]) -> None:
        """Take tiles that were timed on this device (tuner.py) for plans bound from now on, in later processes, too."""
        self.choices = {**self.choices, **found}
        self._choice_file.add(found)

    def trials(self, plan: Plan, timed: bool, deadline: float) -> Iterator[TileTrial]:
        """The tiles that the products and convolutions of a plan can run in: see `Target.trials`, and tuner.py."""
        from engine.targets.cuda.tuner import trials  # only who tunes needs it

        return trials(self, plan.steps, timed, deadline=deadline)

    # Memory

    def constant(self, buffer: Buffer) -> int:
        """The device address of a constant's content, uploaded once. Under the lock."""
        if id(buffer) not in self._constants:
            assert buffer.data is not None, f"{buffer.name} has no content"
            data = np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
            self._constants[id(buffer)] = (buffer, cupy.asarray(data))
        return int(self._constants[id(buffer)][1].data.ptr)

    def reserve_arena(self, nbytes: int) -> None:
        """Make the arena at least this large, after the runs that compute in it now. Under the lock."""
        if nbytes > self._arena.nbytes or not self._arena.nbytes:
            self.device.stream.synchronize()
            self._arena.reserve(max(nbytes, 1))

    @property
    def arena_address(self) -> int:
        return int(self._arena.memory.ptr)

    @property
    def arena_generation(self) -> int:
        """Counts the moves of the arena: a graph captured for an older one is captured anew."""
        return self._arena.generation

    @contextmanager
    def staged(self, nbytes: int) -> Iterator[Slot]:
        """A slot of at least `nbytes` for one run, waiting until one is free. Raises OutOfMemory.

        Where the run fails, whatever it has queued is over before the slot is anyone else's.
        """
        slot = self._sized(nbytes)
        try:
            yield slot
        except BaseException:
            self._settle()
            raise
        finally:
            self.slots.release(slot)

    def _sized(self, nbytes: int) -> Slot:
        """A slot that is large enough. Where memory for a second one is lacking, the run waits for the first."""
        for only in (None, 0):
            slot = self.slots.acquire(only)
            if slot.nbytes >= nbytes:
                return slot
            try:
                with self.lock, self.device.errors():
                    slot.reserve(nbytes)
                return slot
            except BaseException as error:
                self.slots.release(slot)
                if slot.index == 0 or not isinstance(error, OutOfMemory):
                    raise
        raise AssertionError("unreachable: the first slot is returned or its error raised")

    def _settle(self) -> None:
        """Wait until nothing that was queued runs; on a device that is lost, nothing does."""
        for stream in (self.copy_in, self.device.stream, self.copy_out):
            with suppress(cupy.cuda.runtime.CUDARuntimeError):
                stream.synchronize()

    def memory(self) -> Mapping[str, int]:
        """Bytes on the device by kind; the slots count as ``arena``."""
        with self.lock:
            weights = sum(array.nbytes for _, array in self._constants.values())
        return {"weights": weights, "arena": self._arena.nbytes + sum(slot.device_bytes for slot in self.slots.all)}

    # Life cycle

    @cached_property
    def device_info(self) -> DeviceInfo:
        """The device with its ceilings, measured once (ceilings.py)."""
        with self.lock, self.device.errors(), self.device.current():
            flops, nbytes, cached = measure_ceilings(self)
        device = self.device
        return DeviceInfo(
            f"cuda:{device.index}", device.name, device.architecture.name, 0, flops, nbytes, device.cache_bytes, cached
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the GPU's L2 cache."""
        return self.device.cache_bytes

    def close(self) -> None:
        """Give all memory back, after the runs that are under way; later ones are refused."""
        self.slots.close()
        lost = suppress(cupy.cuda.runtime.CUDARuntimeError)  # a lost device has no memory to give back
        with self.lock:
            with lost, self.device.current():
                self._settle()
            self._constants.clear()
            for free in (self._arena.free, *(slot.free for slot in self.slots.all)):
                with lost:
                    free()
            self.device.close()


__all__ = ["CudaTarget", "Executable"]
