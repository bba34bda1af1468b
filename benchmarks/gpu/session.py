"""The GPU that this program runs on: the engine's target, its name, and what a run on it has to say of itself."""

from __future__ import annotations

from benchmarks.environment import gpu_driver, new_run
from benchmarks.results import Ceilings, Device, Run
from engine.targets.cuda.device import Device as Gpu
from engine.targets.cuda.target import CudaTarget

GPU = 0


def present() -> Device:
    """GPU 0 as results name it. Raises DeviceError where there is none. Needs no PyTorch."""
    return _named(Gpu(GPU))


def begin(commit: str) -> tuple[CudaTarget, Device, Run]:
    """GPU 0 with its ceilings measured now. Raises DeviceError where there is none."""
    import torch

    from benchmarks.gpu.timing import measured_ceilings

    target = CudaTarget(GPU)
    ceilings = Ceilings(*measured_ceilings(), target.cache_bytes, target.device_info.peak_cache_bytes)
    torch.cuda.empty_cache()
    run = new_run(
        "gpu",
        commit,
        ceilings,
        gpu_driver(GPU),
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version()),
        nvrtc=target.device.compiler.version,
    )
    return target, _named(target.device), run


def _named(gpu: Gpu) -> Device:
    return Device(gpu.name, gpu.architecture.name, gpu.multiprocessors)
