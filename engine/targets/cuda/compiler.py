"""CUDA C++ source to machine code: NVRTC, in parallel, through a cache on disk.

Called by `target.py` for the kernels of a plan and by `gate.py` for the covering set. Needs no GPU and no driver. What
is compiled is the expanded source (`source.py`), so a cache key (text, flags, compiler version, architecture) changes
with any kernel file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cuda.bindings import nvrtc

from engine.errors import DeviceError, EngineError
from engine.targets.cuda.source import Source, expand

log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size
# ptxas advice that has meant wrong code: serialised wgmma (C7510 to C7514), an unreachable register count.
_FATAL_ADVICE = re.compile(r"C75\d\d|C7602")
_SPILLS = re.compile(r"spilled|Local memory used")


class CompileError(EngineError):
    """A kernel source did not compile, or did not compile cleanly: a defect of the engine, not of the model."""


class DiskCache:
    """Files ``<key>.cubin`` = SHA-256 of the content, then the content. Any failure of the disk means a miss, never an
    error.

    A folder that others could write to is not used: a cubin runs on the GPU with this process's memory. What keeps the
    cache from being of use is logged once.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder: Path | None = None
        self._complained = False
        if folder is not None:
            try:
                _make_private(folder)
                self.folder = folder
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("compiled kernels are not kept, so that every start compiles them again: %s", error)
        self._complained = True

    def read(self, key: str) -> bytes | None:
        if self.folder is None:
            return None
        try:
            content = (self.folder / f"{key}.cubin").read_bytes()
        except OSError:
            return None
        code = content[_DIGEST:]
        return code if code and hashlib.sha256(code).digest() == content[:_DIGEST] else None

    def write(self, key: str, code: bytes) -> None:
        if self.folder is None:
            return
        try:
            # Written beside, then renamed: two processes that compile at once never read half a file.
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{key}.", delete=False) as file:
                beside = Path(file.name)
                try:
                    file.write(hashlib.sha256(code).digest() + code)
                    file.flush()
                    os.replace(beside, self.folder / f"{key}.cubin")
                except OSError:
                    beside.unlink(missing_ok=True)
                    raise
        except OSError as error:
            self._complain(error)


def _make_private(folder: Path) -> None:
    """Make the folder where it is missing. Raises OSError where it cannot be made or is not this user's alone to
    write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError(f"others could write to {folder}: make it yours, with mode 0700")


def nvrtc_version() -> str:
    """NVRTC's version as it says itself, and that of the package it comes from, which tells corrections, too."""
    error, major, minor = nvrtc.nvrtcVersion()
    _check(error, "nvrtcVersion")
    try:
        return f"{major}.{minor} ({version('nvidia-cuda-nvrtc')})"
    except PackageNotFoundError:
        return f"{major}.{minor}"


class LogProgress:
    """Logs how many kernels are compiled, at most once a second; nothing where it is over sooner."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._logged = clock()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if now - self._logged >= 1 or (done == total and self._logged > self._began):
            self._logged = now
            log.info("compiled %d of %d kernels, %.1f s", done, total, now - self._began)


class Compiler:
    """Compiles sources for one architecture. `strict` refuses kernels that spill registers: the gate's rule. A user
    whose GPU or NVRTC the gate has not seen gets a slower kernel rather than none."""

    def __init__(
        self, architecture: str, cache: Path | None = None, workers: int | None = None, strict: bool = False
    ) -> None:
        self.architecture = architecture
        self.strict = strict
        self.cache = DiskCache(cache)
        self.workers = workers or min(16, os.cpu_count() or 1)
        self.version = nvrtc_version()

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            f"--gpu-architecture={self.architecture}",
            "--std=c++17",
            "--device-as-default-execution-space",
            "--fmad=true",
            "--ptxas-options=--warn-on-spills",
            "--ptxas-options=--warn-on-local-memory-usage",
        )

    def key(self, text: str) -> str:
        """The cache key of an expanded source."""
        parts = (text, *self.flags, self.version)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def cubin(self, source: Source, fresh: bool = False) -> bytes:
        """Machine code of `source`; `fresh`: whatever the cache says. Raises CompileError."""
        text = expand(source.text)
        code = None if fresh else self.cache.read(self.key(text))
        return code if code is not None else self._compiled(source.name, text)

    def _compiled(self, name: str, text: str) -> bytes:
        code = self._compile(name, text)
        self.cache.write(self.key(text), code)
        return code

    def cubins(
        self, sources: Iterable[Source], progress: Callable[[int, int], None] | None = None
    ) -> dict[Source, bytes]:
        """Machine code of every distinct source; what the cache lacks is compiled in parallel. `progress(done, total)`
        is called for each of those when it is done. Raises CompileError."""
        texts = {source: expand(source.text) for source in sources}
        result: dict[Source, bytes] = {}
        for source, text in texts.items():
            code = self.cache.read(self.key(text))
            if code is not None:
                result[source] = code
        missing = [source for source in texts if source not in result]
        if not missing:
            return result
        with ThreadPoolExecutor(self.workers, thread_name_prefix="nvrtc") as pool:
            under_way = {pool.submit(self._compiled, source.name, texts[source]): source for source in missing}
            try:
                for done, future in enumerate(as_completed(under_way), start=1):
                    result[under_way[future]] = future.result()
                    if progress is not None:
                        progress(done, len(missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return result

    def _compile(self, name: str, text: str) -> bytes:
        error, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{name}.cu".encode(), 0, [], [])
        _check(error, "nvrtcCreateProgram")
        try:
            flags = [flag.encode() for flag in self.flags]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            buffer = bytearray(size)
            nvrtc.nvrtcGetProgramLog(program, buffer)
            log = bytes(buffer).rstrip(b"\0").decode(errors="replace").strip()
            if int(status) or _FATAL_ADVICE.search(log) or (self.strict and _SPILLS.search(log)):
                raise CompileError(f"kernel {name!r} does not compile cleanly for {self.architecture}:\n{log}")
            error, size = nvrtc.nvrtcGetCUBINSize(program)
            _check(error, "nvrtcGetCUBINSize")
            code = bytearray(size)
            (error,) = nvrtc.nvrtcGetCUBIN(program, code)
            _check(error, "nvrtcGetCUBIN")
            return bytes(code)
        finally:
            nvrtc.nvrtcDestroyProgram(program)


def _check(error: nvrtc.nvrtcResult, what: str) -> None:
    if int(error):
        raise DeviceError(f"{what} failed: {error}. The CUDA target needs the package nvidia-cuda-nvrtc.")
