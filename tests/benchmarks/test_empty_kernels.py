"""The kernels that only write their stamp: they compile, run and stamp. Needs the CUDA packages, no GPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings.nvrtc")

from benchmarks.gpu import empty_kernels
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.compiler import Compiler
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.fake_cupy import fake_gpu
from tests.engine.targets.cuda.test_runtime import load, target_of


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_they_compile(architecture: str) -> None:
    assert Compiler(architecture).cubin(empty_kernels.SOURCE)


def test_no_block_asks_for_more_than_there_is() -> None:
    for architecture in ARCHITECTURES.values():
        launches = empty_kernels.launches(architecture, 132)
        assert len({empty_kernels.label(launch) for launch in launches}) == len(launches)
        assert max(launch.kernel.shared_bytes for launch in launches) == architecture.shared_bytes
        assert all(launch.kernel.threads <= 1024 for launch in launches)


@pytest.mark.skipif(emulator.compiler() is None, reason="no g++ for x86-64 here")
def test_every_one_writes_its_stamp() -> None:
    for launch in empty_kernels.launches(ARCHITECTURES["sm_90a"], 3):
        stamp = np.full(2, -1, np.int64)
        emulator.run(launch, lambda _: 0, stamp.ctypes.data, 900)
        assert 0 < int(stamp[0]) <= ~int(stamp[1])


def test_stamps_that_were_not_written_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as gpu:
        gpu.only_stamp.add(empty_kernels.SOURCE)
        monkeypatch.setattr(empty_kernels, "cupy", gpu.namespace())
        model = load()
        empty = empty_kernels.EmptyKernels(target_of(model))
        with pytest.raises(RuntimeError, match="has not written it"):
            empty.window()
        empty.launch()
        target_of(model).device.stream.synchronize()
        assert all(0 <= step.stamp_us < 1e6 for step in empty.window().steps)
        empty.empty_stamps()
        with pytest.raises(RuntimeError, match="has not written it"):
            empty.window()
        model.close()
