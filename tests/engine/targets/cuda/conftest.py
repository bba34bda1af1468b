"""What runs the kernels in the tests of families: a GPU, or a CPU under the emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from engine.targets.cuda.architecture import ARCHITECTURES
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Runner

CASES = int(os.environ.get("TILEWAVE_KERNEL_CASES", "300"))
EMULATED_CASES = 12  # nearly each of them is a kernel to compile


# Few kernels differ between architectures: these files choose them themselves, or have no other kernels.
_EMULATED = {"test_gemm": ("sm_80", "sm_90a"), "test_kernels": ("sm_80", "sm_90a"), "test_attention": ("sm_80",)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        file = metafunc.module.__name__.rpartition(".")[2]
        emulated = [f"emulated {name}" for name in _EMULATED.get(file, ("sm_90a",))]
        gpu = pytest.param("gpu", marks=pytest.mark.gpu)
        metafunc.parametrize("runner", [*emulated, gpu], indirect=True, scope="module")


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "gpu":
        from tests.engine.targets.cuda.gpu_runner import GpuRunner

        made = GpuRunner()
        yield made
        made.close()
    elif emulator.compiler() is None:
        pytest.skip("no g++ for x86-64 here")
    else:
        yield EmulatedRunner(ARCHITECTURES[request.param.split()[1]])


@pytest.fixture(scope="module")
def count(runner: Runner) -> int:
    """Random cases of one family."""
    return EMULATED_CASES if isinstance(runner, EmulatedRunner) else CASES
