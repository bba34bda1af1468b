"""The small public types of the engine: what a model's tensors are, what its kernels did, what the device is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """A model input or output. `shape` holds ints and, for sizes that vary, symbol names."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class DeviceInfo:
    """The device a model runs on. `peak_flops` (FLOP/s, fp32 on a CPU) and `peak_bytes` (bytes/s, read + write) are
    measured ceilings of this machine, not datasheet figures."""

    device: str
    name: str
    arch: str
    threads: int
    peak_flops: float
    peak_bytes: float


@dataclass(frozen=True)
class StepStat:
    """What one step of one plan has done since the plan was made. `flops` and `bytes` are per launch."""

    step: str
    kernel: str
    op: str
    launches: int
    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class KernelStat:
    """Totals of one kernel family and operator since the model was loaded."""

    kernel: str
    op: str
    launches: int
    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class ProfileRow:
    """One step of a profiled run: `seconds`, `flops` and `bytes` are per call."""

    step: str
    kernel: str
    op: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    roofline: float
    """max(FLOP rate / measured FLOP ceiling, byte rate / measured bandwidth). Above 1 where the data sits in a
    cache."""

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


def roofline(flops: float, nbytes: float, seconds: float, device: DeviceInfo) -> float:
    """Roofline fraction (Williams, Waterman & Patterson 2009) against the device's measured ceilings."""
    if seconds <= 0:
        return 0.0
    return max(flops / seconds / device.peak_flops, nbytes / seconds / device.peak_bytes)
