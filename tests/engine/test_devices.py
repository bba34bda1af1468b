"""Which device `engine.load` takes, and what it says where it cannot take the one asked for. The driver is a fake."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import onnx
import pytest

import engine
from engine import DeviceError
from engine.targets.cuda import probe
from engine.targets.cuda.architecture import ARCHITECTURES, CAPABILITIES, for_capability
from engine.targets.cuda.probe import Gpu, Survey

H100 = Gpu(0, "NVIDIA H100", (9, 0))
T4 = Gpu(0, "Tesla T4", (7, 5))
FUTURE = Gpu(0, "NVIDIA X1", (15, 2))
MODEL = onnx.helper.make_model(
    onnx.parser.parse_graph("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
).SerializeToString()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend a machine: its survey and the CUDA packages that are missing."""

    def pretend(survey: Survey, missing: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(probe, "survey", lambda: survey)
        monkeypatch.setattr(probe, "missing_packages", lambda: list(missing))

    return pretend


def h100(*others: Gpu) -> Survey:
    return Survey((H100, *others), (13, 0))


@pytest.mark.parametrize(
    ("survey", "missing", "device", "says"),
    [
        (Survey(problem="there is no NVIDIA driver"), (), "cuda", ["no NVIDIA driver", "driver 580", "device='cpu'"]),
        (Survey(cuda=(13, 0), problem="the NVIDIA driver sees no GPU"), (), "cuda", ["sees no GPU", "device='cpu'"]),
        (Survey((H100,), (12, 4)), (), "cuda", ["too old", "CUDA 12.4", "13.0", "driver 580"]),
        (h100(), ("cupy",), "cuda:0", ["NVIDIA H100", "cupy is not installed", "pip install 'tilewave[cuda]'"]),
        (h100(), (), "cuda:1", ["'cuda:1' does not exist", "cuda:0 (NVIDIA H100)"]),
        (Survey((T4,), (13, 0)), (), "cuda", ["Tesla T4", "7.5", "8.0", "device='cpu'"]),
        (h100(Gpu(1, "Tesla T4", (7, 5))), (), "cuda:1", ["GPU 1 (Tesla T4)", "7.5"]),
    ],
    ids=["no driver", "no gpu", "old driver", "no cupy", "no such gpu", "old gpu", "old second gpu"],
)
def test_a_gpu_that_cannot_be_used_says_why_and_what_to_do(
    machine: Any, survey: Survey, missing: tuple[str, ...], device: str, says: list[str]
) -> None:
    machine(survey, missing)
    for attempt in (lambda: engine.load(MODEL, device=device), lambda: engine.choose_device(device)):
        with pytest.raises(DeviceError) as caught:
            attempt()
        assert all(part in str(caught.value) for part in says), caught.value


def test_auto_takes_the_first_gpu_that_is_new_enough(machine: Any) -> None:
    machine(Survey((T4, Gpu(1, "NVIDIA A10", (8, 6)), Gpu(2, "NVIDIA H100", (9, 0))), (13, 0)))
    assert engine.choose_device() == engine.choose_device("cuda") == "cuda:1"
    assert engine.choose_device("cuda:2") == "cuda:2"
    assert engine.choose_device("cpu") == "cpu"


def test_a_gpu_too_new_for_the_kernels_is_passed_over(machine: Any) -> None:
    machine(Survey((FUTURE, Gpu(1, "NVIDIA A10", (8, 6))), (13, 0)))
    assert engine.choose_device() == engine.choose_device("cuda") == "cuda:1"
    with pytest.raises(DeviceError, match=r"GPU 0 \(NVIDIA X1\) has compute capability 15\.2; .* built for 8\.0, "):
        engine.choose_device("cuda:0")


def test_where_no_gpu_can_be_used_each_is_named_with_its_reason(machine: Any) -> None:
    machine(Survey((FUTURE, Gpu(1, "Tesla T4", (7, 5))), (13, 0)))
    with pytest.raises(DeviceError) as caught:
        engine.choose_device("cuda")
    for part in ("GPU 0 (NVIDIA X1)", "15.2", "built for", "GPU 1 (Tesla T4)", "7.5", "8.0 (Ampere)", "device='cpu'"):
        assert part in str(caught.value)


def test_every_capability_with_kernels_is_one_that_the_probe_takes(machine: Any) -> None:
    for capability in CAPABILITIES:
        machine(Survey((Gpu(0, "some GPU", capability),), (13, 0)))
        assert engine.choose_device("cuda") == "cuda:0"
        assert for_capability(*capability) in ARCHITECTURES.values()


@pytest.mark.parametrize(
    ("survey", "missing", "says"),
    [
        (Survey((T4,), (13, 0)), (), "7.5"),
        (Survey((H100,), (12, 4)), (), "too old"),
        (h100(), ("cupy",), "cupy is not installed"),
    ],
    ids=["old gpu", "old driver", "no cupy"],
)
def test_auto_says_why_a_gpu_that_is_there_is_not_used(
    machine: Any, caplog: pytest.LogCaptureFixture, survey: Survey, missing: tuple[str, ...], says: str
) -> None:
    machine(survey, missing)
    with caplog.at_level(logging.WARNING), engine.load(MODEL) as model:
        assert model.device_info.device == "cpu"
    assert says in caplog.text


def test_auto_on_a_machine_without_a_driver_is_the_cpu_and_no_news(
    machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine(Survey(problem="there is no NVIDIA driver"))
    with caplog.at_level(logging.INFO):
        assert engine.choose_device() == "cpu"
    assert not caplog.records


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cpu:0", "cuda:²"])
def test_a_device_that_means_nothing_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device must be"):
        engine.load(MODEL, device=device)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_cpu_refuses_precisions_it_does_not_have(machine: Any, device: str) -> None:
    machine(Survey())
    with pytest.raises(DeviceError, match="needs a GPU"):
        engine.load(MODEL, device=device, precision="fp16")


# ---- the driver's own answers


class Driver:
    """libcuda, as far as the probe asks."""

    def __init__(self, gpus: tuple[Gpu, ...] = (), version: int = 13000, init: int = 0) -> None:
        self._gpus, self._version, self._init = gpus, version, init

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDriverGetVersion(self, out: Any) -> int:
        return _put(out, self._version)

    def cuDeviceGetCount(self, out: Any) -> int:
        return _put(out, len(self._gpus))

    def cuDeviceGet(self, out: Any, index: int) -> int:
        return _put(out, index)

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = self._gpus[device.value].name.encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:
        return _put(out, self._gpus[device.value].capability[attribute - 75])


def _put(reference: Any, value: int) -> int:
    reference._obj.value = value
    return 0


def test_the_survey_reads_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (H100, Gpu(1, "NVIDIA A10", (8, 6)))
    monkeypatch.setattr(probe, "_load_driver", lambda: Driver(gpus, 12080))
    assert probe.survey() == Survey(gpus, (12, 8))


@pytest.mark.parametrize(
    ("code", "says"), [(100, "sees no GPU"), (803, "differ in version"), (35, "too old"), (999, "error 999")]
)
def test_a_driver_that_fails_is_told_from_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    monkeypatch.setattr(probe, "_load_driver", lambda: Driver(init=code))
    found = probe.survey()
    assert found.cuda == (13, 0) and not found.gpus and says in found.problem


def test_no_driver_library_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LIBRARIES", ("libno-such-driver.so.1",))
    assert probe.survey() == Survey(problem="there is no NVIDIA driver")


class Management:
    """NVML, as far as the probe asks."""

    def __init__(self, status: int = 0) -> None:
        self.open, self._status = 0, status

    def nvmlInit_v2(self) -> int:
        self.open += not self._status
        return self._status

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.95.05"
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0


def test_the_version_of_the_driver_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pretend(library: Management | None) -> Management | None:
        def load(name: str) -> Management:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        monkeypatch.setattr(probe.ctypes, "CDLL", load)
        return library

    monkeypatch.setattr(probe, "survey", lambda: Survey((H100,), (13, 0)))
    monkeypatch.setattr(probe, "_MODULE_VERSION", tmp_path / "version")
    works = pretend(Management())
    assert works is not None and probe.driver_version() == "580.95.05" and works.open == 0
    for silent in (None, Management(status=9)):
        pretend(silent)
        (tmp_path / "version").write_text("570.11\n")
        assert probe.driver_version() == "570.11"
        (tmp_path / "version").unlink()
        assert probe.driver_version() == "of CUDA 13.0"


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PACKAGES", ("numpy", "no_such_package.part", "no_such_package"))
    assert probe.missing_packages() == ["no_such_package.part", "no_such_package"]
