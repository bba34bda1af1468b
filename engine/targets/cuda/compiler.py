"""CUDA C++ source to machine code: NVRTC, in parallel, through a cache on disk.

Called by `target.py` for the kernels of a plan and by `gate.py` for the covering set. Needs no GPU and no driver. What
is compiled is the expanded source (`source.py`), so a cache key (text, flags, compiler version, architecture) changes
with any kernel file.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda.bindings import nvrtc

from engine.errors import DeviceError, EngineError
from engine.targets.cuda.source import Source, expand

_DIGEST = hashlib.sha256().digest_size
# ptxas advice that has meant wrong code: serialised wgmma (C7510 to C7514), an unreachable register count.
_FATAL_ADVICE = re.compile(r"C75\d\d|C7602")
_SPILLS = re.compile(r"spilled|Local memory used")


class CompileError(EngineError):
    """A kernel source did not compile, or did not compile cleanly: a defect of the engine, not of the model."""


def default_cache() -> Path:
    """``$TILEWAVE_CACHE_DIR/kernels``, else ``~/.cache/tilewave/kernels`` (or under ``$XDG_CACHE_HOME``)."""
    root = os.environ.get("TILEWAVE_CACHE_DIR")
    if root:
        return Path(root) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewave" / "kernels"


class DiskCache:
    """Files ``<key>.cubin`` = SHA-256 of the content, then the content. Any failure of the disk means a miss, never an
    error.

    A folder that others could write to is not used: a cubin runs on the GPU with this process's memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder if folder is not None and _make_private(folder) else None

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
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(file.name, self.folder / f"{key}.cubin")
        except OSError:
            pass


def _make_private(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


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
        error, *version = nvrtc.nvrtcVersion()
        _check(error, "nvrtcVersion")
        self.version: tuple[int, ...] = tuple(version)

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
        parts = (text, *self.flags, str(self.version))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def cubin(self, source: Source) -> bytes:
        """Machine code of `source`. Raises CompileError."""
        text = expand(source.text)
        key = self.key(text)
        code = self.cache.read(key)
        if code is None:
            code = self._compile(source.name, text)
            self.cache.write(key, code)
        return code

    def cubins(
        self, sources: Iterable[Source], progress: Callable[[int, int], None] | None = None
    ) -> dict[Source, bytes]:
        """Machine code of every distinct source, compiled in parallel. `progress(done, total)` is called as they
        finish."""
        distinct = list(dict.fromkeys(sources))
        result: dict[Source, bytes] = {}
        with ThreadPoolExecutor(self.workers, thread_name_prefix="nvrtc") as pool:
            for source, code in zip(distinct, pool.map(self.cubin, distinct), strict=True):
                result[source] = code
                if progress is not None:
                    progress(len(result), len(distinct))
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
