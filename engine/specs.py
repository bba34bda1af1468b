"""The small public types of the engine: what a model's tensors are, what its kernels did, what the device is."""

from __future__ import annotations

from collections.abc import Mapping
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
    """The device a model runs on. `peak_flops` (FLOP/s, fp32 on a CPU) and `peak_bytes` (bytes/s of memory, read and
    written) are measured ceilings of this machine, not datasheet figures; so is `peak_cache_bytes` (bytes/s), for what
    lies in the cache. `cache_bytes` is the size of the last-level cache, 0 where that is not known."""

    device: str
    name: str
    arch: str
    threads: int
    peak_flops: float
    peak_bytes: float
    cache_bytes: int
    peak_cache_bytes: float

    def least_seconds(self, flops: float, nbytes: float, cached_bytes: float) -> float:
        """What so many FLOPs and unique bytes, some of them from the cache, take at least."""
        moving = (nbytes - cached_bytes) / self.peak_bytes + cached_bytes / self.peak_cache_bytes
        return max(flops / self.peak_flops, moving)


@dataclass(frozen=True)
class StepStat:
    """What one step of one plan has done since the plan was made. Per launch: `flops`, `bytes`, and the `cached_bytes`
    among them that the device's cache can hold (engine/plan/residency.py)."""

    step: str
    kernel: str
    op: str
    launches: int
    seconds: float
    flops: int
    bytes: int
    cached_bytes: int


@dataclass(frozen=True)
class TileTrial:
    """One way of running a step, beside the others of that step: what `estimate_us` is mostly spent on is `bound`.
    `product` names the product or convolution; `measured_us` is None where it was not timed; `chosen`: plans bound from
    now on take it."""

    step: str
    product: str
    tile: str
    estimate_us: float
    bound: str
    measured_us: float | None
    chosen: bool


@dataclass(frozen=True)
class KernelStat:
    """Totals of one kernel family and operator since the model was loaded. `cached_bytes`: those of `bytes` that the
    device's cache can hold from one use to the next."""

    kernel: str
    op: str
    launches: int
    seconds: float
    flops: float
    bytes: float
    cached_bytes: float


@dataclass(frozen=True)
class ProfileRow:
    """One step of a profiled run: `seconds`, `flops`, `bytes` and `cached_bytes` are per call."""

    step: str
    kernel: str
    op: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    cached_bytes: int
    """Those of `bytes` that the device's cache can hold from one use to the next."""
    roofline: float
    """The least time that FLOPs and bytes take at the measured ceilings / `seconds`. Bytes that the cache can hold take
    the time of the cache."""

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class PlanProfile:
    """A plan that is ready, and how its runs went since it was made. `sizes` are those of the model's symbols;
    `results` says of each step what it writes, as dtype and shape."""

    sizes: Mapping[str, int]
    rows: tuple[ProfileRow, ...]
    results: tuple[str, ...]


def roofline(flops: float, nbytes: float, cached_bytes: float, seconds: float, device: DeviceInfo) -> float:
    """Roofline fraction (Williams, Waterman & Patterson 2009) against the device's measured ceilings."""
    if seconds <= 0:
        return 0.0
    return device.least_seconds(flops, nbytes, cached_bytes) / seconds
