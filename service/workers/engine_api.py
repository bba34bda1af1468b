"""The part of the `engine` package that a worker uses, as types. Tests put a small engine of their own behind it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray


class EngineTensorSpec(Protocol):
    """`engine.TensorSpec`."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


class EngineKernelStat(Protocol):
    """`engine.KernelStat`: cumulative since load."""

    @property
    def kernel(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def launches(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def flops(self) -> float: ...
    @property
    def bytes(self) -> float: ...
    @property
    def cached_bytes(self) -> float: ...


class EngineProfileRow(Protocol):
    """`engine.ProfileRow`: one step; seconds, FLOPs and bytes are per call."""

    @property
    def step(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def flops(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def cached_bytes(self) -> int: ...
    @property
    def roofline(self) -> float: ...


class EnginePlanProfile(Protocol):
    """`engine.PlanProfile`."""

    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def rows(self) -> Sequence[EngineProfileRow]: ...
    @property
    def results(self) -> Sequence[str]: ...


class EngineDeviceInfo(Protocol):
    """`engine.DeviceInfo`."""

    @property
    def device(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def peak_flops(self) -> float: ...
    @property
    def peak_bytes(self) -> float: ...
    @property
    def peak_cache_bytes(self) -> float: ...


class EngineModel(Protocol):
    """`engine.Model`."""

    @property
    def inputs(self) -> Sequence[EngineTensorSpec]: ...
    @property
    def outputs(self) -> Sequence[EngineTensorSpec]: ...
    @property
    def device_info(self) -> EngineDeviceInfo: ...
    @property
    def fallback_ops(self) -> int: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def concurrent_runs(self) -> int: ...
    @property
    def divides_threads(self) -> bool: ...
    @property
    def size_limits(self) -> Mapping[str, int]:
        """The most that a symbolic dim may be, where the model limits it."""
        ...

    @property
    def packed_mask(self) -> str | None:
        """The input that says which tokens are real, where runs compute only those; None where they compute all."""
        ...

    def computed_tokens(self, rows: int, width: int, tokens: int) -> int:
        """How many tokens a run on inputs (rows, width) computes, so many of which are real: in every row of the mask
        ones and then zeros, at least one of the former."""
        ...

    def run(
        self, feeds: Mapping[str, NDArray[Any]], /, on_start: Callable[[], None] = ..., side_by_side: bool = ...
    ) -> Mapping[str, NDArray[Any]]:
        """Run the model; `on_start` is called when the device is about to compute, unless something raises before.
        `side_by_side`: another run goes on meanwhile, with which it divides the threads where the model does that."""
        ...

    def kernel_stats(self) -> Sequence[EngineKernelStat]: ...
    def plan_profiles(self) -> Sequence[EnginePlanProfile]: ...
    def memory(self) -> Mapping[str, int]: ...
    def close(self) -> None: ...


class EngineModule(Protocol):
    """The module `engine`."""

    EngineError: type[Exception]
    DeviceLost: type[Exception]
    ShapeError: type[Exception]
    OutOfMemory: type[Exception]

    def choose_device(self, device: str) -> str:
        """``cpu`` or ``cuda:N`` for a device as the settings name it; raises a subclass of `EngineError` for a GPU that
        cannot be used."""
        ...

    def background(self) -> AbstractContextManager[None]:
        """What this thread does inside gives way to what others do with the engine."""
        ...

    def load(self, path: str, *, device: str, precision: str, threads: int | None, packed: str) -> EngineModel:
        """Load a model file; raises a subclass of `EngineError`."""
        ...


def real_engine() -> EngineModule:
    """The engine of this project, imported when the first worker starts."""
    import engine

    return cast(EngineModule, engine)


def uses_gpu(device: str) -> bool:
    """Whether models asked to run on `device` will try a GPU."""
    if device != "auto":
        return device.startswith("cuda")
    import engine

    return engine.choose_device() != "cpu"


def why_unusable(device: str, engine: Callable[[], EngineModule]) -> str:
    """Why the GPU that the settings name cannot be used, and what to do; empty where it can, or if none is named."""
    if not device.startswith("cuda"):
        return ""
    module = engine()
    try:
        module.choose_device(device)
    except module.EngineError as error:
        return str(error).replace("device='cpu'", "--device cpu")  # as the engine's other users write it
    return ""


def import_path(engine: Callable[[], EngineModule]) -> str:
    """ "module:name" of a function or class that returns the engine, for another process to import.

    Raises ValueError for one that cannot be imported by name.
    """
    name: str = engine.__qualname__
    if not name.isidentifier() or engine.__module__ == "__main__":
        raise ValueError(f"{engine.__module__}.{name} cannot be imported by the engine's process")
    return f"{engine.__module__}:{name}"
