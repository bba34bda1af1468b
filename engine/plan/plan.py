"""The Plan: a short list of concrete steps over tensors, with the memory laid out and the cost of every step known.

`build.py` makes plans, targets run them. A plan holds for one assignment of sizes to the model's symbols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from engine.ir.ops import Cost, Op
from engine.plan.tensor import Buffer, Tensor


class Access(Enum):
    """How a target's kernel can read or write one tensor of a step."""

    STRIDED = "strided"  # any strides
    INNER = "inner"  # the last axis of `order` has stride 1 (or size 1), the other strides are free
    DENSE = "dense"  # no gaps, axes in `order`


@dataclass(frozen=True)
class Requirement:
    """What a kernel asks of one tensor: `access`, with its axes from outermost to innermost in `order`."""

    access: Access = Access.STRIDED
    order: tuple[int, ...] = ()


class Capabilities(Protocol):
    """What a plan has to know of a target. Targets answer by kernel family, never by model."""

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        """Requirements of each input and of each output of a step. Raises UnsupportedOp where no kernel fits."""
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """One kernel launch (or one host call, for `Opaque`)."""

    name: str  # unique in the plan, from the ONNX nodes it came from
    op: Op
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    cost: Cost


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps in order. `inputs` and `outputs` are the caller's tensors (always row-major); `sizes` the symbols' values.

    `arena_bytes` is what the intermediates need with buffers shared by lifetime, `unshared_bytes` the sum of all of
    them.
    """

    sizes: Mapping[str, int]
    steps: tuple[Step, ...]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    unshared_bytes: int
