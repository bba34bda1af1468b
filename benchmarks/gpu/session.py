"""The GPU that this program runs on: the engine's target, its name, and what a run on it has to say of itself."""

from __future__ import annotations

import torch

from benchmarks.environment import gpu_driver, new_run
from benchmarks.gpu.timing import measured_ceilings
from benchmarks.results import Ceilings, Device, Run
from engine.targets.cuda.target import CudaTarget


def begin(commit: str) -> tuple[CudaTarget, Device, Run]:
    """GPU 0 with its ceilings measured now. Raises DeviceError where there is none."""
    target = CudaTarget(0)
    device = Device(target.device.name, target.device.architecture.name, target.device.multiprocessors)
    run = new_run(
        "gpu",
        commit,
        Ceilings(*measured_ceilings(), target.cache_bytes, target.device_info.peak_cache_bytes),
        gpu_driver(target.device.index),
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version()),
        nvrtc=target.device.compiler.version,
    )
    return target, device, run
