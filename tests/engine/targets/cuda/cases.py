"""What the tests of kernel families make their cases with."""

from __future__ import annotations

import numpy as np

from engine.ir.dtype import DType
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from tests.engine.targets.cuda.harness import Case, Runner, run_cases


def check(runner: Runner, cases: list[Case]) -> None:
    failures = run_cases(runner, cases)
    assert not failures, f"{len(failures)} of {len(cases)} failed\n" + "\n".join(failures[:12])


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in name])


def ragged(rng: np.random.Generator, most: int, multiple: int = 1) -> int:
    """A size, small ones as likely as large ones."""
    return max(multiple, int(2 ** rng.uniform(0, np.log2(most))) // multiple * multiple)


def fed(dtype: DType, shape: tuple[int, ...], inner: int, number: int = 1) -> Tensor:
    """An operand with axis `inner` innermost."""
    axes = list(range(len(shape)))
    axes.append(axes.pop(inner))
    buffer = Buffer(f"input{number}", BufferKind.INPUT, int(np.prod(shape)) * dtype.itemsize)
    return Tensor(buffer, dtype, shape, row_major(shape, tuple(axes)))


def order_of(rng: np.random.Generator, rank: int) -> tuple[int, ...]:
    """Axes from the outermost to the innermost: most often in their own order."""
    axes = range(rank) if rng.random() < 0.5 else rng.permutation(rank)
    return tuple(int(axis) for axis in axes)
