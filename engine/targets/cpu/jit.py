"""Compiles kernel specs to machine code and keeps it: in memory for the process, on disk for the next one.

The disk cache holds one object file per kernel, keyed by everything the machine code depends on: the spec (which names
the processor and its features), the sources of the code generators, the LLVM version. It is a convenience: whatever is
wrong with it (corrupt, unreadable, read-only) costs a compilation and a warning, never an error.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

from engine.background import Turns
from engine.cache_folder import cache_folder
from engine.errors import DeviceError
from engine.targets.cpu.codegen.isa import Isa, initialise_llvm
from engine.targets.cpu.kernel import Code

_DIGEST_BYTES = 32


class Compiler:
    """Turns specs into addresses of loaded functions. Thread-safe; one per process is enough (`compiler()`)."""

    def __init__(self, directory: Path | None) -> None:
        initialise_llvm()
        self._directory = directory
        self._addresses: dict[str, int] = {}
        self._objects: dict[str, bytes] = {}  # compiled, not linked yet
        self.turns = Turns()
        self._machines: dict[Isa, llvm.TargetMachine] = {}
        self._engine: llvm.ExecutionEngine | None = None
        self._warned = False
        self.compiled = 0  # kernels compiled, not loaded from disk, since the start

    def load(self, specs: Iterable[Code]) -> dict[str, int]:
        """The address of each spec's function by symbol. Compiles what is neither in memory nor on disk.

        Each kernel is a turn of its own, so that a model that needs one waits for one of another model, not for all.
        Raises DeviceError where the system forbids making memory executable.
        """
        wanted = {spec.symbol: spec for spec in specs}
        missing = [spec for symbol, spec in wanted.items() if symbol not in self._addresses]
        for spec in missing:
            with self.turns:
                if spec.symbol not in self._addresses and spec.symbol not in self._objects:
                    self._objects[spec.symbol] = self._object(spec)
        if missing:
            with self.turns:
                self._link([spec.symbol for spec in missing if spec.symbol in self._objects])
        return {symbol: self._addresses[symbol] for symbol in wanted}

    def assembly(self, spec: Code) -> str:
        """The machine code as text: for tests that look for an instruction or a spill, and for curious people."""
        module = self._optimised(spec)
        return str(self._machine(spec.isa).emit_assembly(module))

    def _object(self, spec: Code) -> bytes:
        key = _key(spec)
        stored = self._read(key)
        if stored is not None:
            return stored
        module = self._optimised(spec)
        code = bytes(self._machine(spec.isa).emit_object(module))
        self.compiled += 1
        self._write(key, code)
        return code

    def _optimised(self, spec: Code) -> llvm.ModuleRef:
        module = llvm.parse_assembly(spec.ir())
        module.verify()
        # The kernels are written in the form that the back end wants, so inlining is all that is left to do: the usual
        # -O3 pipeline takes several times longer and gains nothing.
        builder = llvm.create_pass_builder(self._machine(spec.isa), llvm.create_pipeline_tuning_options(0))
        passes = llvm.create_new_module_pass_manager()
        passes.add_always_inliner_pass()
        passes.run(module, builder)
        return module

    def _machine(self, isa: Isa) -> llvm.TargetMachine:
        if isa not in self._machines:
            target = llvm.Target.from_triple(llvm.get_process_triple())
            self._machines[isa] = target.create_target_machine(
                cpu=isa.cpu, features=isa.features, opt=2, codemodel="jitdefault", jit=True
            )
        return self._machines[isa]

    def _link(self, symbols: list[str]) -> None:
        try:
            if self._engine is None:
                # The engine owns a machine and a module of its own; kernels come to it as finished objects.
                machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
                    codemodel="jitdefault", jit=True
                )
                self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
            for symbol in symbols:
                self._engine.add_object_file(llvm.ObjectFileRef.from_data(self._objects[symbol]))
            self._engine.finalize_object()
            found = {symbol: int(self._engine.get_function_address(symbol)) for symbol in symbols}
        except (RuntimeError, OSError, MemoryError) as error:
            raise DeviceError(
                f"compiled kernels cannot be loaded ({error}): this system seems to forbid executable memory; "
                "allow it for this process (SELinux: execmem; systemd: MemoryDenyWriteExecute=no)"
            ) from error
        if not all(found.values()):
            raise DeviceError("a compiled kernel was not found after loading; delete the kernel cache and try again")
        self._addresses.update(found)
        for symbol in symbols:
            del self._objects[symbol]

    def _read(self, key: str) -> bytes | None:
        if self._directory is None:
            return None
        try:
            if not _is_trusted(self._directory):
                self._warn("can be written by others")
                return None
            content = (self._directory / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read ({error})")
            return None
        code = content[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() != content[:_DIGEST_BYTES]:
            self._warn(f"has a corrupt file, {key}")
            return None
        return code

    def _write(self, key: str, code: bytes) -> None:
        if self._directory is None:
            return
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._directory)  # readable by the owner only
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                Path(name).replace(self._directory / key)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._warn(f"cannot be written ({error})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"the kernel cache {self._directory} {what}; kernels are compiled anew", stacklevel=2)


@cache
def compiler() -> Compiler:
    """The process's compiler, with the cache folder of the environment."""
    return Compiler(cache_folder("cpu"))


def _unlock_in_child() -> None:
    # Another thread of the parent may have been compiling; the child has only the thread that forked.
    if compiler.cache_info().currsize:
        compiler().turns = Turns()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def _is_trusted(directory: Path) -> bool:
    """Whether only we, or the administrator, can have put machine code there. Raises OSError if it cannot be read."""
    if not hasattr(os, "getuid"):
        return True
    status = directory.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _key(spec: Code) -> str:
    parts = (repr(spec), spec.symbol, _generator_digest(), repr(llvm.llvm_version_info), llvm.get_process_triple())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() + ".o"


@cache
def _generator_digest() -> str:
    """A digest of the code generators' sources: another version of them must not find these objects."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *(here.parents[1] / "ir").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
