"""The engine with a fault in it: an input that begins with `FAULT` makes a kernel write where nothing is.

`tests/gpu/test_service.py` puts it into the engine's process; the error that follows is the driver's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

import engine
from service.workers.engine_api import EngineModule

FAULT = -777.0
_KERNEL = r'extern "C" __global__ void fault(int* nowhere) { *nowhere = 1; }'


class _Model:
    def __init__(self, model: engine.Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(
        self, feeds: Mapping[str, np.ndarray], on_start: Callable[[], None] = lambda: None
    ) -> dict[str, np.ndarray]:
        if next(iter(feeds.values())).flat[0] == FAULT:
            import cupy

            cupy.RawKernel(_KERNEL, "fault")((1,), (1,), (np.uint64(64),))
        return self._model.run(feeds, on_start)


class FaultyEngine:
    """The module `engine` with another `load`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(engine, name)

    def load(self, path: str, *, device: str, precision: str, threads: int | None, packed: str) -> _Model:
        return _Model(engine.load(path, device=device, precision=precision, threads=threads, packed=packed))


def faulty_engine() -> EngineModule:
    """What the engine's process imports."""
    return cast(EngineModule, FaultyEngine())
