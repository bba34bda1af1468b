"""Which GPUs this process can use, and in plain words why not. Asks the driver library itself.

Importing this needs neither CuPy nor a driver, and asking creates no context on a GPU. Called by `engine.loading`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DeviceError
from engine.targets.cuda.architecture import CAPABILITIES

PACKAGES = ("cupy", "cuda.bindings")
"""What the extra `cuda` installs."""
NEEDED_CUDA = (13, 0)
NEEDED_DRIVER = 580  # the first driver branch for CUDA 13

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
_MODULE_VERSION = Path("/sys/module/nvidia/version")
_INSUFFICIENT_DRIVER, _NO_DEVICE, _SYSTEM_DRIVER_MISMATCH = 35, 100, 803
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver numbers it (after CUDA_VISIBLE_DEVICES)."""

    index: int
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Survey:
    """What there is. `cuda` is the CUDA version the driver speaks; `problem` why the driver names no GPU, if it does
    not."""

    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] | None = None
    problem: str = ""


class _DriverError(Exception):
    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with error {code}")
        self.code = code


def survey() -> Survey:
    """Ask the driver."""
    driver = _load_driver()
    if driver is None:
        return Survey(problem="there is no NVIDIA driver")
    cuda: tuple[int, int] | None = None
    try:
        version, count = ctypes.c_int(), ctypes.c_int()
        _call(driver, "cuDriverGetVersion", ctypes.byref(version))
        cuda = version.value // 1000, version.value % 1000 // 10
        _call(driver, "cuInit", 0)
        _call(driver, "cuDeviceGetCount", ctypes.byref(count))
        return Survey(tuple(_describe(driver, index) for index in range(count.value)), cuda)
    except _DriverError as error:
        said = {
            _NO_DEVICE: "the NVIDIA driver sees no GPU",
            _SYSTEM_DRIVER_MISMATCH: "the NVIDIA driver's library and kernel module differ in version (reboot)",
            _INSUFFICIENT_DRIVER: "the NVIDIA driver is too old",
        }
        return Survey(cuda=cuda, problem=said.get(error.code, f"the NVIDIA driver does not work: {error}"))


def _load_driver() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = int(getattr(driver, name)(*arguments))
    if code:
        raise _DriverError(name, code)


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", ctypes.byref(device), index)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _ATTRIBUTE_MAJOR, device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _ATTRIBUTE_MINOR, device)
    return Gpu(index, name.value.decode(errors="replace"), (major.value, minor.value))


def driver_version() -> str:
    """The driver's own version, such as ``580.95.05``, from its management library or its kernel module; where neither
    can be asked, the CUDA version that it speaks."""
    try:
        management = ctypes.CDLL(_MANAGEMENT_LIBRARY)
        text = ctypes.create_string_buffer(96)
        _call(management, "nvmlInit_v2")
        try:
            _call(management, "nvmlSystemGetDriverVersion", text, len(text))
        finally:
            _call(management, "nvmlShutdown")
        return text.value.decode(errors="replace")
    except (OSError, _DriverError):
        pass
    try:
        return _MODULE_VERSION.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return f"of CUDA {_dotted(survey().cuda or (0, 0))}"


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def usable_gpu(index: int | None = None) -> Gpu:
    """GPU number `index`, or the first one that can be used. Raises DeviceError that names what is missing and the
    remedy."""
    found = survey()
    if found.cuda is not None and found.cuda < NEEDED_CUDA:
        raise DeviceError(
            f"the NVIDIA driver is too old: it supports CUDA {_dotted(found.cuda)}, this engine needs "
            f"{_dotted(NEEDED_CUDA)}. Install driver {NEEDED_DRIVER} or newer, or use device='cpu'"
        )
    if not found.gpus:
        problem = found.problem or "the NVIDIA driver sees no GPU"
        raise DeviceError(f"{problem}. Install NVIDIA driver {NEEDED_DRIVER} or newer for a GPU, or use device='cpu'")
    gpu = _first_usable(found.gpus) if index is None else _numbered(found.gpus, index)
    missing = missing_packages()
    if missing:
        raise DeviceError(
            f"GPU {gpu.index} ({gpu.name}) cannot be used: the package {missing[0]} is not installed. "
            "Install the extra: pip install 'tilewave[cuda]' (make serve EXTRAS=cuda), or use device='cpu'"
        )
    return gpu


def _numbered(gpus: Sequence[Gpu], index: int) -> Gpu:
    if index >= len(gpus):
        there = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise DeviceError(f"device 'cuda:{index}' does not exist; there is {there}")
    refusal = _refusal(gpus[index])
    if refusal:
        raise DeviceError(f"{refusal}. Use another GPU or device='cpu'")
    return gpus[index]


def _first_usable(gpus: Sequence[Gpu]) -> Gpu:
    refusals = []
    for gpu in gpus:
        refusal = _refusal(gpu)
        if not refusal:
            return gpu
        refusals.append(refusal)
    raise DeviceError(f"{'; '.join(refusals)}. Use another GPU or device='cpu'")


def _refusal(gpu: Gpu) -> str:
    """Why there are no kernels for this GPU; empty where there are."""
    if gpu.capability in CAPABILITIES:
        return ""
    oldest = min(CAPABILITIES)
    if gpu.capability < oldest:
        needed = f"need {_dotted(oldest)} (Ampere) or newer"
    else:
        needed = f"are built for {', '.join(map(_dotted, sorted(CAPABILITIES)))}"
    return f"GPU {gpu.index} ({gpu.name}) has compute capability {_dotted(gpu.capability)}; the kernels {needed}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
