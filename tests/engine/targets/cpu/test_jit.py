from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import llvmlite.binding as llvm
import pytest

from engine.errors import DeviceError
from engine.targets.cpu import jit
from engine.targets.cpu.codegen.isa import ISA_VARIABLE, host_isa, host_isas
from engine.targets.cpu.jit import Compiler
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec


@dataclass(frozen=True)
class StoreSpec(KernelSpec):
    """Writes a number to where its argument points."""

    number: int
    family: ClassVar[str] = "store"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("out",)

    def emit(self, kernel: KernelBuilder) -> None:
        kernel.store(kernel.i64(self.number), kernel.pointer("out"), 8)


def stored(compiler: Compiler, number: int) -> int:
    """What the kernel for `number` writes."""
    spec = StoreSpec(host_isa(), number)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(
        compiler.load([spec])[spec.symbol]
    )
    word = ctypes.c_int64(0)
    slots = (ctypes.c_void_p * 1)(ctypes.addressof(word))
    function(ctypes.addressof(slots), 0, 0)
    return word.value


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def test_compiles_once_and_then_loads(tmp_path: Path) -> None:
    first, second = Compiler(tmp_path / "cache"), Compiler(tmp_path / "cache")
    assert [stored(first, n) for n in (5, 6, 5)] == [5, 6, 5]
    assert first.compiled == 2
    assert [stored(second, n) for n in (5, 6)] == [5, 6]
    assert second.compiled == 0


def test_cache_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    compiler = Compiler(directory)
    stored(compiler, 1)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (path,) = files(directory)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "replace"])
def test_a_corrupt_file_is_compiled_anew_with_a_warning(tmp_path: Path, damage: str) -> None:
    first = Compiler(tmp_path)
    stored(first, 7)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    match damage:
        case "truncate":
            content = content[:-10]
        case "empty":
            content = bytearray()
        case "flip":
            content[100] ^= 1
        case "replace":
            content = bytearray(os.urandom(len(content)))
    path.write_bytes(content)
    second = Compiler(tmp_path)
    with pytest.warns(UserWarning, match="corrupt"):
        assert stored(second, 7) == 7
    assert second.compiled == 1
    third = Compiler(tmp_path)
    assert stored(third, 7) == 7
    assert third.compiled == 0


def test_a_cache_that_cannot_be_used_costs_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    compiler = Compiler(blocked / "cache")
    with pytest.warns(UserWarning, match=r"cannot be (read|written)"):
        assert stored(compiler, 3) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert stored(compiler, 4) == 4


def test_a_cache_that_others_can_write_is_not_read(tmp_path: Path) -> None:
    stored(Compiler(tmp_path), 8)
    tmp_path.chmod(0o777)
    compiler = Compiler(tmp_path)
    with pytest.warns(UserWarning, match="by others"):
        assert stored(compiler, 8) == 8
    assert compiler.compiled == 1


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.os, "fdopen", full)
    compiler = Compiler(tmp_path)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert stored(compiler, 9) == 9
    assert files(tmp_path) == []


def test_loading_from_many_threads(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(stored(compiler, n % 5))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(n % 5 for n in range(20))
    assert compiler.compiled == 5


def test_a_system_without_executable_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise RuntimeError("Unable to allocate section memory!")

    monkeypatch.setattr(llvm, "create_mcjit_compiler", forbidden)
    with pytest.raises(DeviceError, match="executable memory"):
        stored(Compiler(None), 1)


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in host_isas():
        monkeypatch.setenv(ISA_VARIABLE, name)
        assert host_isa().name == name
    monkeypatch.setenv(ISA_VARIABLE, "z80")
    with pytest.raises(DeviceError, match="z80"):
        host_isa()


def test_the_process_ends_cleanly_with_workers_asleep_or_spinning() -> None:
    script = (
        "import numpy as np; from engine.targets.cpu.runtime import Program, pool\n"
        "p = Program([], 4); p.prepare(); pool().run(p)"
    )
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
