"""What takes long before models are timed, each kind by processes of its own (workers.py): references, and what
torch.compile makes of the peers. Used by `models.py` and `packed.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.cases.models import ModelCase
from benchmarks.gpu.references import References, free
from benchmarks.measure import reason
from benchmarks.workers import GRACE_SECONDS, Expired, Recipe, one_at_a_time, time_limit

Network = Callable[..., torch.Tensor]
Outputs = Mapping[str, np.ndarray]
Found = TypeVar("Found")


def outcomes(
    recipes: Sequence[Recipe[Found]], threads: int, seconds: float, compile_until: float | None, deadline: float
) -> Iterator[tuple[str, Found | str]]:
    """What the processes of `recipes` measure, one case at a time, or why one does not, by the name of the case.

    They have `seconds` for references and kernels, and until `compile_until` for torch.compile, None: which takes no
    part. No case is begun at `deadline`. Both are times of `time.monotonic`. `threads`: of each process.
    """
    begin = time.monotonic()
    # Inductor's own workers would stay behind, busy, when the time is up.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
    ready_by = max(begin + seconds, compile_until or begin) + GRACE_SECONDS
    for number, (name, outcome) in enumerate(one_at_a_time(recipes, environment, ready_by, deadline)):
        if not number:
            print(f"references, kernels and torch.compile: {time.monotonic() - begin:.0f} s", flush=True)
        yield name, outcome


def references(cases: Sequence[ModelCase], path: Path, threads: int) -> tuple[dict[str, Outputs], dict[str, str]]:
    """The outputs in float64 of every case by its name, and why there are none, of those that have none."""
    found: dict[str, Outputs] = {}
    failures: dict[str, str] = {}
    twins = References(threads=threads)
    for case in cases:
        try:
            found[case.name] = twins.of(case, path)
        except Exception as problem:
            failures[case.name] = f"no reference: {reason(problem)}"
    del twins
    free()
    return found, failures


class Compilations:
    """Networks that torch.compile has compiled, by the name of a case and the kind of peer, until the time `until` (of
    `time.monotonic`). `given_up`, where it is not empty, says why it is not even tried."""

    def __init__(self, until: float, given_up: str) -> None:
        self._until = until
        self._given_up = given_up
        self._compiled: dict[tuple[str, str], Network] = {}
        self._reasons: dict[tuple[str, str], str] = {}

    def add(
        self, name: str, kind: str, network: Network, arguments: tuple[torch.Tensor, ...], mode: str | None = None
    ) -> None:
        """Compile a network and run it once. What does not work or is not done in time has a reason."""
        if self._given_up:
            self._reasons[name, kind] = self._given_up
            return
        begin = time.monotonic()
        # One function for each case, as a user would have; limited to the process's time, not to this case's.
        compiled = torch.compile(network, mode=mode, dynamic=False)
        try:
            with time_limit(self._until):
                compiled(*arguments)
                torch.cuda.synchronize()
        except Expired:
            self._reasons[name, kind] = f"not done in time, after {time.monotonic() - begin:.0f} s"
        except Exception as problem:
            self._reasons[name, kind] = reason(problem)
        else:
            self._compiled[name, kind] = compiled
        torch.cuda.empty_cache()

    def __len__(self) -> int:
        return len(self._compiled)

    def get(self, name: str, kind: str) -> Network | None:
        return self._compiled.get((name, kind))

    def found(self, name: str, kind: str) -> Network:
        """Raises RuntimeError with the reason why it was not compiled."""
        if (name, kind) in self._reasons:
            raise RuntimeError(self._reasons[name, kind])
        return self._compiled[name, kind]


def told(names: Sequence[str], begin: float, prepared: float, loaded: float, compiled: int) -> None:
    """Print how long each part took, of times of `time.monotonic`; the last one ends now."""
    print(
        f"{', '.join(names)}: references {prepared - begin:.0f} s, ours {loaded - prepared:.0f} s, "
        f"{compiled} compiled {time.monotonic() - loaded:.0f} s",
        flush=True,
    )
