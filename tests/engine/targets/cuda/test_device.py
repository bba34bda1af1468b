"""Loading kernels and naming the driver's errors, on a driver that is a fake. Needs the CUDA packages, no GPU."""

# ruff: noqa: E402  (what needs the CUDA packages is imported after the skip)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

cupy = pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings.nvrtc")

from engine.errors import DeviceError, DeviceLost, OutOfMemory
from engine.targets.cuda import device as module
from engine.targets.cuda.compiler import Compiler, Source
from engine.targets.cuda.device import Device, check
from engine.targets.cuda.kernel import Kernel

KERNEL = Kernel("tiny", Source("tiny", 'extern "C" __global__ void kernel(float* x) { x[0] += 1.0f; }\n'), 32)
ILLEGAL_ADDRESS = 700


class RuntimeFailure(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"runtime error {status}")
        self.status = status


class DriverFailure(RuntimeFailure):
    pass


class FakeDriver:
    """`accepts` says which code can be loaded; `sticky` is what every call returns from now on."""

    def __init__(self) -> None:
        self.accepts: Callable[[bytes], bool] = lambda code: code[:4] == b"\x7fELF"
        self.refusal = 200  # CUDA_ERROR_INVALID_IMAGE
        self.loaded: list[bytes] = []
        self.sticky = 0

    def synchronize(self) -> None:
        if self.sticky:
            raise RuntimeFailure(self.sticky)

    def module(self) -> object:
        def load(code: bytes) -> None:
            if not self.accepts(code):
                raise DriverFailure(self.refusal)
            self.loaded.append(code)

        return SimpleNamespace(load=load, get_function=lambda name: SimpleNamespace(ptr=1))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    cuda = SimpleNamespace(
        memory=cupy.cuda.memory,
        function=SimpleNamespace(Module=made.module),
        driver=SimpleNamespace(CUDADriverError=DriverFailure),
        runtime=SimpleNamespace(CUDARuntimeError=RuntimeFailure, deviceSynchronize=made.synchronize),
    )
    monkeypatch.setattr(module, "cupy", SimpleNamespace(cuda=cuda))
    return made


def make_device(folder: Path) -> Device:
    device = Device.__new__(Device)
    device.index = 0
    device.compiler = Compiler("sm_80", folder)
    device._functions, device._modules = {}, []
    return device


def test_a_whole_cubin_that_the_driver_refuses_is_compiled_once_more(
    driver: FakeDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = make_device(tmp_path / "cache")
    key = device.compiler.key(KERNEL.source.text)
    device.compiler.cache.write(key, b"whole, and no code")
    with device.errors():
        device.load([KERNEL])
    fresh = Compiler("sm_80").cubin(KERNEL.source)
    assert driver.loaded == [fresh]
    assert device.compiler.cache.read(key) == fresh, "the next start would meet the bad file again"
    assert "the driver refuses the cached one" in caplog.text


def test_code_that_the_driver_refuses_twice_is_an_error(driver: FakeDriver, tmp_path: Path) -> None:
    driver.accepts = lambda _: False
    device = make_device(tmp_path / "cache")
    with pytest.raises(DeviceError, match="runtime error 200") as told, device.errors():
        device.load([KERNEL])
    assert not isinstance(told.value, DeviceLost)


def test_no_memory_for_a_kernel_is_out_of_memory_and_compiles_nothing_again(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.accepts, driver.refusal = lambda _: False, 2
    device = make_device(tmp_path / "cache")
    device.compiler.cubin(KERNEL.source)
    monkeypatch.setattr(device.compiler, "_compile", None)
    with pytest.raises(OutOfMemory, match="too little memory"), device.errors():
        device.load([KERNEL])
    driver.accepts = lambda _: True
    device.load([KERNEL])


@pytest.mark.parametrize("kind", [RuntimeFailure, DriverFailure])
@pytest.mark.parametrize(
    ("status", "sticky", "error"),
    [(1, 0, DeviceError), (2, 0, OutOfMemory), (ILLEGAL_ADDRESS, ILLEGAL_ADDRESS, DeviceLost)],
)
def test_failures_have_their_errors(
    driver: FakeDriver, tmp_path: Path, kind: type[RuntimeFailure], status: int, sticky: int, error: type[Exception]
) -> None:
    driver.sticky = sticky
    with pytest.raises(error) as told, make_device(tmp_path).errors():
        raise kind(status)
    assert type(told.value) is error


def test_failures_of_calls_without_cupy_have_the_same_errors(driver: FakeDriver, tmp_path: Path) -> None:
    results = module.driver.CUresult
    with pytest.raises(OutOfMemory, match="tiny: CUDA_ERROR_OUT_OF_MEMORY"):
        check((results.CUDA_ERROR_OUT_OF_MEMORY,), "tiny")
    with pytest.raises(DeviceError, match="tiny: CUDA_ERROR_INVALID_VALUE") as told, make_device(tmp_path).errors():
        check((results.CUDA_ERROR_INVALID_VALUE,), "tiny")
    assert type(told.value) is DeviceError
    driver.sticky = ILLEGAL_ADDRESS
    with pytest.raises(DeviceLost), make_device(tmp_path).errors():
        check((results.CUDA_ERROR_ILLEGAL_ADDRESS,), "tiny")
    check((results.CUDA_SUCCESS,), "tiny")


def test_a_nested_block_keeps_the_error(driver: FakeDriver, tmp_path: Path) -> None:
    device = make_device(tmp_path)
    for wanted in (OutOfMemory("a"), DeviceLost("b"), DeviceError("c")):
        with pytest.raises(type(wanted)) as told, device.errors(), device.errors():
            raise wanted
        assert told.value is wanted
