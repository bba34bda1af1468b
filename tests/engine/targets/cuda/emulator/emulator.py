"""Runs the CUDA kernels without a GPU: their own source, compiled for the CPU by the machine's C++ compiler.

The kernels reach the hardware only through `kernels/ptx/`, one instruction a function. `device.h` stands for CUDA C++,
`ptx/` beside it for those instructions, and `runtime/`, compiled once, does the work: threads are fibers, and every
access to shared memory is checked for races (races.h), also between the blocks of a cluster. What it cannot show:
speed, races between others, and what the real instructions do beyond their description; for those there are the GPU
tests.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock

from engine.cache_folder import cache_folder
from engine.targets.cuda.kernel import AnyMap, Launch, PixelMap, Pointer, TensorMap, pack
from engine.targets.cuda.source import Source, expand

_HERE = Path(__file__).parent
_MESSAGE_BYTES = 512  # as runtime/threads.h has it
_COMMON = ("-std=c++17", "-march=native", "-fno-strict-aliasing", "-shared", "-fPIC", "-w")
_RUNTIME_FLAGS = (*_COMMON, "-O3", "-fno-semantic-interposition", "-fno-plt")
# -fsanitize=thread makes every access to memory a call of the runtime, -fsanitize=bounds every index beyond an array.
# The sanitizers' own libraries are left out, as all others are: what a kernel needs of them the runtime has brought
# into the process.
_SANITIZED = ("-fsanitize=thread,bounds", "--param", "tsan-instrument-func-entry-exit=0")
_FLAGS = (*_COMMON, "-O1", "-fvisibility=hidden", *_SANITIZED, "-nostdlib")
# The products are generated as machine instructions (gemm_wgmma.py, attention_wgmma.py); ptx/ beside this file has them
# for every width.
_GENERATED_PRODUCT = re.compile(
    r"^template <int N, class T> DEVICE void wgmma(?:_across)?\(.*?^}\n", re.MULTILINE | re.DOTALL
)
_DYNAMIC_SHARED = re.compile(r"^.*extern __shared__ .*$", re.MULTILINE)


@cache
def compiler() -> str | None:
    """The C++ compiler that makes kernels runnable here, or None: g++ on x86-64."""
    return shutil.which("g++") if platform.machine() == "x86_64" else None


class EmulationError(Exception):
    """A kernel does not compile for the CPU, or did what a GPU would not have survived."""


def host_source(source: Source, architecture: int) -> str:
    """The kernel's whole source for the CPU."""
    text = expand(source.text, _emulated_ptx().get)
    text = _GENERATED_PRODUCT.sub("", text)
    text = _DYNAMIC_SHARED.sub("u8* const shared = emulator::own_shared_memory();", text)
    # Named only where the kernel asks, so that architectures share what is the same on all.
    define = f"#define __CUDA_ARCH__ {architecture}\n" if "__CUDA_ARCH__" in text else ""
    runtime, device, driver = _frame()
    # Nothing of a kernel is seen outside: the compiler leaves out what the kernel does not use.
    return f"{define}{runtime}\n{device}\nnamespace {{\n{text}\n}}  // namespace\n{driver}"


@cache
def _emulated_ptx() -> dict[str, str]:
    return {f"ptx/{path.name}": path.read_text(encoding="utf-8") for path in (_HERE / "ptx").iterdir()}


@cache
def _frame() -> tuple[str, ...]:
    return tuple((_HERE / name).read_text(encoding="utf-8") for name in ("runtime.h", "device.h", "driver.h"))


@cache
def load(source: Source, architecture: int) -> Callable[..., int]:
    """The kernel as a function of this process. Raises EmulationError where it does not compile."""
    _load_runtime()
    library = _compiled_kernel(host_source(source, architecture), source.name)
    function = ctypes.CDLL(str(library)).emulate_kernel
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    return function


_loading = Lock()


def _load_runtime() -> None:
    """Put the runtime where kernels find its functions."""
    with _loading:
        _runtime()


@cache
def _runtime() -> ctypes.CDLL:
    files = sorted((_HERE / "runtime").glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in (*files, *(_HERE / "runtime").glob("*.h"))]
    key_text = "\0".join((_frame()[0], *texts))
    library = _compiled(key_text, (*_RUNTIME_FLAGS, *map(str, files)), "the emulator's runtime")
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compiled_kernel(text: str, name: str, *flags: str) -> Path:
    return _compiled(text, (*_FLAGS, *flags, "-x", "c++", "-", "-lgcc"), name)


def _compiled(text: str, arguments: Sequence[str], name: str) -> Path:
    """The library that the compiler makes with `arguments`; `text` is its standard input, or what stands in the files
    that they name."""
    gxx = compiler()
    assert gxx is not None, "the caller checks that there is a compiler"
    key = hashlib.sha256("\0".join((text, gxx, *arguments)).encode()).hexdigest()
    library = _cache() / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "made.so"
            command = [gxx, *arguments, "-o", str(made)]
            done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            if done.returncode:
                raise EmulationError(f"{name} does not compile for the CPU:\n{done.stderr[:3000]}")
            os.replace(made, library)
    return library


@cache
def _cache() -> Path:
    folder = cache_folder("emulated-kernels") or Path(tempfile.mkdtemp(prefix="emulated-kernels"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def run(
    launch: Launch,
    address: Callable[[Pointer], int],
    stamp: int,
    architecture: int,
    status: int = 0,
    last_first: bool = False,
    late: int = 0,
) -> None:
    """Run one launch; `address` places pointers in host memory, `stamp` and `status` are addresses, too. `last_first`:
    threads take their turns from the last to the first. `late`: not 0, some get none until nobody else can go on,
    chosen by this number. Raises EmulationError."""
    kernel = launch.kernel
    params = pack(launch.arguments, address, lambda map_: encode(map_, address(map_.pointer)), stamp, status)
    memory = ctypes.create_string_buffer(len(params) + 64)
    start = -ctypes.addressof(memory) % 64 + ctypes.addressof(memory)  # tensor maps are aligned to 64 bytes
    ctypes.memmove(start, params, len(params))
    sizes = (ctypes.c_uint * 8)(*launch.grid, kernel.threads, last_first, kernel.shared_bytes, kernel.cluster, late)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if load(kernel.source, architecture)(start, sizes, message):
        text = message.value.decode()
        raise EmulationError(f"{kernel.source.name}: {_with_lines(text, kernel.source, architecture)}")


_PLACE = re.compile(r"\[\+(0x[0-9a-f]+)\]")


def _with_lines(message: str, source: Source, architecture: int) -> str:
    """The message with the kernel's lines in place of addresses, from the innermost call outwards."""
    places = _PLACE.findall(message)
    if not places:
        return message
    text = host_source(source, architecture)
    library = _compiled_kernel(text, source.name, "-g1")  # the same code, with its lines
    # A place is where a call returns to: the byte before is part of it.
    addresses = [hex(int(place, 16) - 1) for place in places]
    command = ["addr2line", "-i", "-a", "-e", str(library), *addresses]
    found = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    lines, calls = text.splitlines(), iter(re.split(r"^0x[0-9a-f]+\n", found, flags=re.MULTILINE)[1:])

    def quoted(_: re.Match[str]) -> str:
        numbers = [int(number) for number in re.findall(r":(\d+)", next(calls)) if 0 < int(number) <= len(lines)]
        return "[" + " < ".join(lines[number - 1].strip() for number in numbers) + "]"

    return _PLACE.sub(quoted, message)


def encode(map_: AnyMap, address: int) -> bytes:
    """The `Map` of runtime.h. Raises EmulationError where the driver would refuse a map."""
    size = {"float": 4, "e4m3": 1, "i8": 1}.get(map_.pointer.ctype, 2)
    tf32 = size == 4 and not (isinstance(map_, TensorMap) and map_.exact)
    if isinstance(map_, PixelMap):
        return _encode_pixels(map_, address, size, tf32)
    for stride in (map_.row_stride, *(stride for _, stride in map_.outer)):
        if stride <= 0 or stride * size % 16:
            raise EmulationError(f"a stride that the driver refuses: {map_}")
    outer = map_.outer or ((1, 0), (1, 0))
    words = (
        address, size, map_.columns, map_.rows, map_.row_stride * size, map_.box_columns, map_.box_rows, tf32,
        *(count for count, _ in outer), *(stride * size for _, stride in outer),
    )  # fmt: skip
    return struct.pack("<16Q", *words, *(0,) * (16 - len(words)))


_CORNERS = {1: (-(2**15), 2**15 - 1), 2: (-(2**7), 2**7 - 1), 3: (-(2**4), 2**4 - 1)}
"""The corners of a bounding box, by the number of spatial axes."""


def _encode_pixels(map_: PixelMap, address: int, size: int, tf32: bool) -> bytes:
    """The `PixelMap` of runtime/memory.cpp, if it is one that cuTensorMapEncodeIm2col documents."""
    lowest, highest = _CORNERS[len(map_.sizes)]
    strides = [stride * size for stride in (*map_.strides, map_.image_stride)]
    boxes = [
        before - 1 + upper - lower >= 0 for before, lower, upper in zip(map_.sizes, map_.lower, map_.upper, strict=True)
    ]
    for holds, rule in (
        (address % 16 == 0, "the address is a multiple of 16"),
        (all(0 < count <= 2**32 for count in (map_.channels, *map_.sizes, map_.images)), "sizes are 1 to 2^32"),
        (all(stride % 16 == 0 and 0 < stride < 2**40 for stride in strides), "strides are multiples of 16 below 2^40"),
        (all(lowest <= c <= highest for c in (*map_.lower, *map_.upper)), f"corners are {lowest} to {highest}"),
        (all(boxes), "the bounding box is not empty"),
        (all(1 <= step <= 8 for step in map_.steps), "element strides are 1 to 8"),
        (0 < map_.box_channels <= 256 and map_.box_channels * size in (32, 64, 128), "a pixel's bytes are a swizzle's"),
        (0 < map_.box_pixels <= 1024, "a copy has at most 1024 pixels"),
    ):
        if not holds:
            raise EmulationError(f"a map in im2col mode that the driver refuses: {rule}; {map_}")

    def padded(values: Sequence[int], by: int) -> tuple[int, ...]:
        return (*values, *(by,) * (3 - len(values)))

    return struct.pack(
        "<Q5I4x4Q9hBx4I28x",
        address,
        *(map_.channels, *padded(map_.sizes, 1), map_.images),
        *(*padded(strides[:-1], 0), strides[-1]),
        *padded(map_.lower, 0), *padded(map_.upper, 0), *padded(map_.steps, 1),
        tf32, size, map_.box_channels, map_.box_pixels, len(map_.sizes),
    )  # fmt: skip
