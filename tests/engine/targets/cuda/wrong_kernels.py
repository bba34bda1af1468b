"""Kernels that are made wrong on purpose: what the emulator has to show of them."""

from __future__ import annotations

import pytest

from engine.targets.cuda.architecture import SM_90A
from tests.engine.targets.cuda.cases import LATE
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, run_cases


def emulator_or_skip() -> EmulatedRunner:
    """A runner of sm_90a's kernels in the emulator."""
    if emulator.compiler() is None:
        pytest.skip("no g++ for x86-64 here")
    return EmulatedRunner(SM_90A)


def check_is_caught(
    runner: EmulatedRunner, case: Case, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case of one launch fails, with warps in time or with late ones, when its kernel has the second text of
    `change` where the first one stands."""
    right, wrong = change
    assert case.lowered is not None
    (launch,) = case.lowered
    text = emulator.host_source(launch.kernel.source, 900)
    assert text.count(right) == 1
    monkeypatch.setattr(emulator, "host_source", lambda source, architecture: text.replace(right, wrong))
    emulator.load.cache_clear()
    failures = []
    for number in (0, *LATE):
        with runner.with_latecomers(number):
            failures += run_cases(runner, [case])
    emulator.load.cache_clear()
    assert failures
