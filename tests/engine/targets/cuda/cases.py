"""What the tests of kernel families make their cases with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Pointwise
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Launch
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner, run_cases

LATE = (1, 2)
"""What latecomers are chosen by."""


Item = TypeVar("Item")


def check(runner: Runner, cases: list[Case]) -> None:
    failures = run_cases(runner, cases)
    assert not failures, f"{len(failures)} of {len(cases)} failed\n" + "\n".join(failures[:12])


def check_late(runner: Runner, cases: list[Case]) -> None:
    """In the emulator also with warps, warpgroups and blocks of a cluster that come late."""
    check(runner, cases)
    if isinstance(runner, EmulatedRunner):
        for number in LATE:
            with runner.with_latecomers(number):
                check(runner, cases)


def thinned(runner: Runner, items: Sequence[Item], every: int = 2, first: int = 0) -> Sequence[Item]:
    """All of the items on a GPU; some of them in the emulator, where each is a kernel to compile for seconds."""
    return items[first % every :: every] if isinstance(runner, EmulatedRunner) else items


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


def broadcast_of(rng: np.random.Generator, lead: tuple[int, ...]) -> tuple[int, ...]:
    """`lead` with some sizes 1 and some left out."""
    sizes = tuple(1 if rng.random() < 0.3 else size for size in lead)
    return sizes[int(rng.integers(0, len(lead) + 1)) if rng.random() < 0.3 else 0 :]


def order_of(rng: np.random.Generator, rank: int) -> tuple[int, ...]:
    """Axes from the outermost to the innermost: most often in their own order."""
    axes = range(rank) if rng.random() < 0.5 else rng.permutation(rank)
    return tuple(int(axis) for axis in axes)


FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)
SIGNED = (DType.I64, DType.I32, DType.I16, DType.I8)
UNSIGNED = (DType.U64, DType.U32, DType.U16, DType.U8)
INTEGERS = (*SIGNED, *UNSIGNED)


def wide(dtype: DType) -> DType:
    """The type in which elements of a type are accumulated."""
    return dtype if dtype is DType.F64 or not dtype.is_float else DType.F32


def wide_arg(index: int, dtype: DType) -> ex.Expr:
    return ex.cast(ex.Arg(index, dtype), wide(dtype))


def narrowed(dtype: DType) -> ex.Expr:
    """The accumulator, stored in `dtype`."""
    return ex.cast(ex.Acc(wide(dtype)), dtype)


def placed(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], number: int = 0) -> Tensor:
    """An operand whose axes lie in a random order in memory, sometimes with gaps or as a window."""
    order = tuple(int(axis) for axis in rng.permutation(len(shape)))
    gap = tuple(size + int(rng.choice([0, 0, 1, 3])) for size in shape)
    strides = row_major(gap, order)
    offset = int(rng.choice([0, 0, 8, 5]))
    nbytes = (offset + int(np.prod(gap))) * dtype.itemsize
    return Tensor(Buffer(f"input{number}", BufferKind.INPUT, nbytes), dtype, shape, strides, offset)


def reordered(step: Step, rng: np.random.Generator) -> Step:
    """The same step with its results in random orders."""
    outputs = tuple(
        replace(t, strides=row_major(t.shape, tuple(int(a) for a in rng.permutation(len(t.shape)))))
        for t in step.outputs
    )
    return replace(step, outputs=outputs)


def wiped(tensor: Tensor, context: Context) -> list[Launch]:
    """Launches that make a result 0."""
    op = Pointwise((ex.Const(0.0, tensor.dtype),))
    return family_of(op).lower(Step("wipe", op, (), (tensor,), op.cost((), (tensor,))), context)


def told(launches: Sequence[Launch]) -> list[tuple[str, object, int]]:
    """What tells launches apart."""
    return [(launch.kernel.source.text, launch.grid, launch.kernel.shared_bytes) for launch in launches]
