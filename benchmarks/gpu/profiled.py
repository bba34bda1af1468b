"""What ncu profiles (ncu.py): ``python -m benchmarks.gpu.profiled FILE CASE …`` loads a model and launches, of each
case of the suite `metrics`, every kernel once, one after the other, after a run to warm up."""

from __future__ import annotations

import sys

import cupy
import numpy as np

import engine
from benchmarks.cases import METRICS
from benchmarks.gpu.executables import executable


def main(path: str, names: list[str]) -> None:
    by_name = {case.name: case.of for case in METRICS}
    with engine.load(path, device="cuda:0", precision="fp16", strict=True) as model:
        for name in names:
            plan = model.plan(by_name[name].sizes)
            bound = executable(model, plan)
            outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
            bound.run(by_name[name].feeds(), outputs)  # which leaves the inputs where they are
            bound.launch_each()
            cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.profilerStart()
            bound.launch_each()
            cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.profilerStop()
            bound.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
