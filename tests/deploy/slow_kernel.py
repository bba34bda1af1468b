"""A kernel of the CPU target made slow on purpose, while its model runs: for the test that monitoring sees it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.model import Model
from engine.targets.cpu.codegen import executor
from engine.targets.cpu.runtime import PARTS
from engine.targets.cpu.target import CpuExecutable, _Native

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
_WORD = 8
_FUNCTION, _STEP = executor.ENTRY_FUNCTION // _WORD, executor.ENTRY_STEP // _WORD


@contextmanager
def slow_kernel(model: Model, op: str, seconds: float) -> Iterator[None]:
    """Every task of every `op` in the plans that are ready now takes `seconds` longer: the executor's table gets the
    address of a function that calls the kernel and then sleeps."""
    kept: list[object] = []
    restore = []

    def slowed(address: int) -> int:
        kernel = _KERNEL(address)

        def run(arguments: int, task: int, scratch: int) -> None:
            kernel(arguments, task, scratch)
            time.sleep(seconds)

        callback = _KERNEL(run)
        kept.extend((kernel, callback))
        pointer = ctypes.cast(callback, ctypes.c_void_p).value
        assert pointer is not None
        return pointer

    for ready in model._plans.values():
        assert isinstance(ready.bound, CpuExecutable)
        # All of them now: a table that is copied while the kernel is slow would not be mended.
        copies = [section for number in range(PARTS) for section in ready.bound._in_part(number).sections]
        for section in (*ready.bound._sections, *copies):
            if isinstance(section, _Native):
                for row in section.program._table:
                    if section.steps[int(row[_STEP])].op == op:
                        restore.append((row, int(row[_FUNCTION])))
                        row[_FUNCTION] = slowed(int(row[_FUNCTION]))
    assert restore, f"no plan that is ready has a {op}"
    try:
        yield
    finally:
        for row, address in restore:
            row[_FUNCTION] = address
        time.sleep(10 * seconds)  # a run that has taken the address needs `kept`
        kept.clear()
