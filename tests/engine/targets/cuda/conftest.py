"""What runs the kernels in the tests of families: a GPU, or a CPU under the emulator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from engine.targets.cuda.architecture import ARCHITECTURES
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.tally import Tally, lines

CASES = int(os.environ.get("TILEWAVE_KERNEL_CASES", "300"))
EMULATED_CASES = 3  # nearly each of them is a kernel to compile; a GPU takes `CASES`


# Few kernels differ between architectures: these files choose them themselves, or have no other kernels.
_EMULATED = {
    "test_gemm": ("sm_80", "sm_90a"),
    "test_gemm_fp8": ("sm_80", "sm_90a"),
    "test_gemm_int8": ("sm_80", "sm_90a"),
    "test_kernels": ("sm_80", "sm_90a"),
    "test_attention": ("sm_80",),
}


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


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Every test's cases go with its report, also from other processes."""
    if "runner" in request.fixturenames:
        runner = request.getfixturevalue("runner")
        runner.tally = Tally()
        record_property("emulated cases" if isinstance(runner, EmulatedRunner) else _GPU_CASES, runner.tally.rows)


_GPU_CASES = "cases on a GPU"
_LEAST = 500  # cases of a family


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The cases of every family that ran on a GPU."""
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ()))
    found = [value for report in reports for name, value in report.user_properties if name == _GPU_CASES]
    for line in lines(found, _LEAST) if found else ():
        terminalreporter.write_line(line)


@pytest.fixture
def hopper(runner: Runner) -> Runner:
    """A runner of sm_90a's kernels."""
    if not runner.context.architecture.wgmma:
        pytest.skip("only sm_90a has wgmma")
    return runner


@pytest.fixture(scope="module")
def count(runner: Runner) -> int:
    """Random cases of one test."""
    return EMULATED_CASES if isinstance(runner, EmulatedRunner) else CASES


@pytest.fixture(scope="module")
def family_count(runner: Runner, count: int) -> int:
    """Random cases of the only test of a family."""
    return count if isinstance(runner, EmulatedRunner) else max(count, _LEAST)
