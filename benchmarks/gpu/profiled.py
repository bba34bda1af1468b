"""What ncu profiles (ncu.py): ``python -m benchmarks.gpu.profiled FILE WINDOWS CASE …`` loads a model and launches, of
each case of the suite `metrics`, every kernel several times over, one after the other and each with its stamp, and
kernels that only write their stamp in between. What it launched and what the stamps say is written to WINDOWS, so that
they and ncu's times are of one and the same execution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cupy
import numpy as np

import engine
from benchmarks.cases import METRICS
from benchmarks.cases.metrics import MetricsCase
from benchmarks.gpu import windows
from benchmarks.gpu.empty_kernels import EmptyKernels
from benchmarks.gpu.executables import executable, target_of
from benchmarks.gpu.windows import Launched, Window
from engine.model import Model
from engine.targets.cuda.executable import Executable

REPETITIONS = 5
_EMPTY_WINDOWS = 3  # for every repetition of a case


def launch_all(model: Model, cases: Sequence[MetricsCase]) -> Iterator[Window]:
    """The windows of a model's cases, launched one after the other as they are asked for."""
    empty = EmptyKernels(target_of(model))
    for case in cases:
        plan = model.plan(case.of.sizes)
        bound = executable(model, plan)
        outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
        bound.run(case.of.feeds(), outputs)  # which leaves the inputs where they are
        for warm_up in (bound.launch_each, empty.launch):
            warm_up()
            cupy.cuda.runtime.deviceSynchronize()
        for _ in range(REPETITIONS):
            bound.empty_stamps()
            _profiled(partial(bound.launch_each, stamped=True))
            yield _window(case.name, bound)
            for _ in range(_EMPTY_WINDOWS):
                empty.empty_stamps()
                _profiled(empty.launch)
                yield empty.window()
        bound.close()


def _profiled(launch: Callable[[], None]) -> None:
    """Launch with profilers on, and wait."""
    cupy.cuda.runtime.profilerStart()
    launch()
    cupy.cuda.runtime.deviceSynchronize()
    cupy.cuda.runtime.profilerStop()


def _window(case: str, bound: Executable) -> Window:
    return Window(
        case,
        tuple(
            Launched(
                ", ".join([step.name, *(one.kernel.family for one in row)]),
                tuple((one.grid, one.kernel.threads) for one in row),
                float(ns) * 1e-3,
            )
            for (step, row), ns in zip(bound.launches, bound.stamps_ns(), strict=True)
        ),
    )


def main(path: str, to: str, names: list[str]) -> None:
    by_name = {case.name: case for case in METRICS}
    with engine.load(path, device="cuda:0", precision="fp16", strict=True) as model:
        windows.write(Path(to), list(launch_all(model, [by_name[name] for name in names])))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
