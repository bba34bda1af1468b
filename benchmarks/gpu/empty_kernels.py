"""Kernels that do nothing but write their stamp, of several shapes: what a profiler counts beyond the stamp is the
launch's own (profiled.py)."""

from __future__ import annotations

import cupy
import numpy as np

from benchmarks.gpu.windows import EMPTY, Launched, Window
from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import Kernel, Launch, params_struct
from engine.targets.cuda.program import STAMP_BYTES
from engine.targets.cuda.source import Source
from engine.targets.cuda.target import CudaTarget

SOURCE = Source(
    "empty",
    f"""#include "types.cuh"
#include "scheduler/stamp.cuh"
#include "ptx/grid.cuh"
{params_struct([])}
extern "C" __global__ void kernel(const __grid_constant__ Params p) {{
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  stamp_end(p.stamp);
}}
""",
)
_UNUSED = np.uint64(2**64 - 1)


def launches(architecture: Architecture, multiprocessors: int) -> list[Launch]:
    """One block, one for each multiprocessor, many of them; small and large ones; with and without the most shared
    memory that a block can have."""
    shapes = [
        (1, 32, 0), (1, 384, architecture.shared_bytes), (multiprocessors, 128, 0),
        (multiprocessors, 384, architecture.shared_bytes), (8 * multiprocessors, 256, 0), (multiprocessors, 1024, 0),
    ]  # fmt: skip
    return [Launch(Kernel("empty", SOURCE, threads, shared), (blocks, 1, 1), ()) for blocks, threads, shared in shapes]


def label(launch: Launch) -> str:
    """``132x384+227K``: blocks, threads and shared memory."""
    shared = launch.kernel.shared_bytes
    return f"{launch.grid[0]}x{launch.kernel.threads}" + (f"+{shared >> 10}K" if shared else "")


class EmptyKernels:
    """All of them on one GPU, ready to be launched one after the other."""

    def __init__(self, target: CudaTarget) -> None:
        self._target = target
        device = target.device
        self._launches = launches(device.architecture, device.multiprocessors)
        with target.lock, device.errors(), device.current():
            device.load(launch.kernel for launch in self._launches)
            self._stamps = cupy.asarray(self._empty)
            first = int(self._stamps.data.ptr)
            self._packed = [
                packed
                for i, launch in enumerate(self._launches)
                for packed in device.pack([launch], lambda _: 0, first + STAMP_BYTES * i)
            ]

    @property
    def _empty(self) -> np.ndarray:
        return np.full(2 * len(self._launches), _UNUSED, np.uint64)

    def empty_stamps(self) -> None:
        """Make the stamps ready for a launch."""
        self._stamps.set(self._empty)
        cupy.cuda.runtime.deviceSynchronize()

    def launch(self) -> None:
        """Queue all of them, as `Executable.launch_each` does a plan's."""
        target = self._target
        with target.lock, target.device.errors(), target.device.current():
            target.device.launch_all(self._packed, target.device.stream, target.overlap)

    def window(self) -> Window:
        """What was launched since the stamps were empty, once it is over. Raises RuntimeError where it was not."""
        words = self._stamps.get().reshape(-1, 2)
        if (words == _UNUSED).any():
            raise RuntimeError("a kernel that only writes its stamp has not written it")
        took = ~words[:, 1] - words[:, 0]
        return Window(
            EMPTY,
            tuple(
                Launched(label(launch), ((launch.grid, launch.kernel.threads),), float(ns) * 1e-3)
                for launch, ns in zip(self._launches, took, strict=True)
            ),
        )
