"""One GPU: its architecture, loaded kernels, tensor maps and launches. The only file that calls the driver.

CuPy holds memory, streams and modules; what it does not wrap (launch attributes, tensor maps) goes through
cuda.bindings. Importing this file needs the CUDA packages; making a `Device` needs a driver and a supported GPU.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cupy
from cuda.bindings import driver

from engine.cache_folder import cache_folder
from engine.errors import DeviceError, DeviceLost, OutOfMemory
from engine.targets.cuda.architecture import Architecture, for_capability
from engine.targets.cuda.compiler import Compiler, LogProgress
from engine.targets.cuda.kernel import AnyMap, Kernel, Launch, PixelMap, Pointer, TensorMap, pack

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and CUDA_ERROR_OUT_OF_MEMORY
_MAP_TYPES = {
    "half": (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
    "bfloat16": (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
    "e4m3": (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
    "i8": (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
    "float": (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4),
}
"""Element types of tensor maps, and their bytes."""
_STATIC_LIMIT = 48 << 10  # more dynamic shared memory than this has to be asked for


@dataclass(frozen=True)
class Packed:
    """A launch with the bytes of its parameters."""

    launch: Launch
    params: bytes


class Device:
    """GPU number `index`, with the kernels loaded on it. `cache`: the folder of compiled ones (None: the usual one)."""

    def __init__(self, index: int = 0, cache: Path | None = None) -> None:
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"no usable CUDA driver: {error}. Use device='cpu', or install NVIDIA driver 580 or newer"
            ) from None
        if index >= count:
            raise DeviceError(f"device 'cuda:{index}' does not exist: the machine has {count} CUDA device(s)")
        self.index = index
        with self.errors(), self.current():
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            self.name: str = properties["name"].decode()
            self.multiprocessors: int = properties["multiProcessorCount"]
            self.cache_bytes: int = properties["l2CacheSize"]
            self.architecture: Architecture = for_capability(properties["major"], properties["minor"])
            self.stream = cupy.cuda.Stream(non_blocking=True)
        self.compiler = Compiler(self.architecture.name, cache or cache_folder("kernels"))
        self._functions: dict[Kernel, driver.CUfunction] = {}
        self._modules: list[cupy.cuda.function.Module] = []

    def current(self) -> cupy.cuda.Device:
        """A context manager that makes this the calling thread's device."""
        return cupy.cuda.Device(self.index)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Failures of the driver as errors of the engine."""
        try:
            yield
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise _out_of_memory(error) from None
        except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
            raise (_out_of_memory(error) if error.status == _OUT_OF_MEMORY else self._failure(error)) from error
        except DeviceError as error:
            failure = self._failure(error)
            if failure is error:
                raise
            raise failure from error

    def _failure(self, error: Exception) -> DeviceError:
        """A sticky error shows in whatever is called next: the GPU is lost to this process."""
        try:
            cupy.cuda.runtime.deviceSynchronize()
        except cupy.cuda.runtime.CUDARuntimeError as lasting:
            return DeviceLost(f"GPU {self.index} failed and is lost to this process: {lasting}")
        return error if isinstance(error, DeviceError) else DeviceError(f"GPU {self.index} failed: {error}")

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compile (in parallel, or from the cache) and load what is not loaded yet, and log how far that is. Raises
        CompileError."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._functions]
        code = self.compiler.cubins((kernel.source for kernel in missing), LogProgress())
        for kernel in missing:
            try:
                self._load(kernel, code[kernel.source])
            except cupy.cuda.driver.CUDADriverError as error:
                if error.status == _OUT_OF_MEMORY:
                    raise
                # A file of the cache can be whole and still no code for this driver. Code fresh from the compiler that
                # the driver refuses, too, is an error.
                log.warning(
                    "kernel %s is compiled anew: the driver refuses the cached one: %s", kernel.source.name, error
                )
                self._load(kernel, self.compiler.cubin(kernel.source, fresh=True))

    def _load(self, kernel: Kernel, code: bytes) -> None:
        module = cupy.cuda.function.Module()
        module.load(code)
        function = driver.CUfunction(module.get_function("kernel").ptr)
        if kernel.shared_bytes > _STATIC_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes), kernel.source.name)
        self._modules.append(module)
        self._functions[kernel] = function

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], params: bytes, stream: cupy.cuda.Stream, overlap: bool
    ) -> None:
        """Launch a loaded kernel. With `overlap` it may start while the kernel before it on the stream still drains."""
        block = ctypes.create_string_buffer(params, len(params))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = kernel.shared_bytes
        config.hStream = driver.CUstream(stream.ptr)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        check(
            driver.cuLaunchKernelEx(config, self._functions[kernel], ctypes.addressof(pointers), 0), kernel.source.name
        )

    def pack(
        self, launches: Iterable[Launch], address: Callable[[Pointer], int], stamp: int = 0, status: int = 0
    ) -> list[Packed]:
        """Launches with their parameters. `address` places what they point to, `stamp` and `status` are the addresses
        of their stamp slot (0: none) and status word. Those that write stamps do nothing ahead: what overlaps with the
        kernel before would be in no stamp."""

        def encode(map_: AnyMap) -> bytes:
            return self.encode(map_, address(map_.pointer))

        return [
            Packed(launch, pack(launch.arguments, address, encode, stamp, status, stamp != 0)) for launch in launches
        ]

    def launch_all(
        self, packed: Iterable[Packed], stream: cupy.cuda.Stream, overlap: bool, follows: bool = False
    ) -> None:
        """Launch one after the other. With `overlap` each may start while the one before it still drains; the first,
        where it `follows` another of ours."""
        for i, one in enumerate(packed):
            self.launch(one.launch.kernel, one.launch.grid, one.params, stream, overlap and (follows or i > 0))

    def capture(
        self,
        packed: Iterable[Packed],
        stream: cupy.cuda.Stream,
        overlap: bool,
        before: Callable[[], object] = lambda: None,
    ) -> cupy.cuda.Graph:
        """A graph of the launches, behind what `before` queues in the stream."""
        with stream:
            stream.begin_capture()
            try:
                before()
                self.launch_all(packed, stream, overlap)
            except BaseException:
                with suppress(Exception):  # a stream must not be left capturing
                    stream.end_capture()
                raise
            return stream.end_capture()

    def encode(self, map_: AnyMap, address: int) -> bytes:
        """The 128 bytes of a tensor map: rows of a box are swizzled over their bytes, zeros outside."""
        return _encode_pixels(map_, address) if isinstance(map_, PixelMap) else _encode_box(map_, address)

    def close(self) -> None:
        """Unload every kernel."""
        self._functions.clear()
        self._modules.clear()


_SWIZZLES = {
    32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
"""How the rows of a box of so many bytes are swizzled."""
_MAP_OPTIONS = (
    driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
)
_SMALL_TENSOR = 128 << 10  # bytes
_SMALL_TENSOR_BIT = 1 << 21


def _encode_box(map_: TensorMap, address: int) -> bytes:
    data_type, itemsize = _MAP_TYPES[map_.pointer.ctype]
    if map_.exact and map_.pointer.ctype == "float":
        data_type = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    box = [map_.box_columns, map_.box_rows, *(1 for _ in map_.outer)]
    error, encoded = driver.cuTensorMapEncodeTiled(
        data_type,
        len(box),
        address,
        _u64s(map_.columns, map_.rows, *(size for size, _ in map_.outer)),
        _u64s(*(stride * itemsize for stride in (map_.row_stride, *(stride for _, stride in map_.outer)))),
        _u32s(*box),
        _u32s(*(1 for _ in box)),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        _SWIZZLES[map_.box_columns * itemsize],
        *_MAP_OPTIONS,
    )
    check((error,), "cuTensorMapEncodeTiled")
    return ctypes.string_at(encoded.getPtr(), 128)


def _encode_pixels(map_: PixelMap, address: int) -> bytes:
    data_type, itemsize = _MAP_TYPES[map_.pointer.ctype]
    error, encoded = driver.cuTensorMapEncodeIm2col(
        data_type,
        2 + len(map_.sizes),
        address,
        _u64s(map_.channels, *map_.sizes, map_.images),
        _u64s(*(stride * itemsize for stride in (*map_.strides, map_.image_stride))),
        list(map_.lower),
        list(map_.upper),
        map_.box_channels,
        map_.box_pixels,
        _u32s(1, *map_.steps, 1),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        _SWIZZLES[map_.box_channels * itemsize],
        *_MAP_OPTIONS,
    )
    check((error,), "cuTensorMapEncodeIm2col")
    words = bytearray(ctypes.string_at(encoded.getPtr(), 128))
    if map_.extent * itemsize < _SMALL_TENSOR:
        # Drivers up to CUDA 13.0 set a bit for small tensors with which copies in this mode are wrong.
        second = int.from_bytes(words[8:16], "little") & ~_SMALL_TENSOR_BIT
        words[8:16] = second.to_bytes(8, "little")
    return bytes(words)


def _u64s(*values: int) -> list[driver.cuuint64_t]:
    return [driver.cuuint64_t(value) for value in values]


def _u32s(*values: int) -> list[driver.cuuint32_t]:
    return [driver.cuuint32_t(value) for value in values]


def check(result: tuple[driver.CUresult, ...], what: str) -> None:
    """Raise OutOfMemory or DeviceError where a driver call failed."""
    if int(result[0]) == _OUT_OF_MEMORY:
        raise _out_of_memory(f"{what}: {result[0].name}")
    if int(result[0]):
        raise DeviceError(f"{what}: {result[0].name}")


def _out_of_memory(reason: object) -> OutOfMemory:
    return OutOfMemory(f"the GPU has too little memory: {reason}. Use a smaller batch or sequence")
