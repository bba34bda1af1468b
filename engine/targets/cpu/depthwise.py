"""Depthwise convolutions: every channel by itself."""

from __future__ import annotations

from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.kernel import Context, Launch


def fits(conv: Conv, x: Tensor, w: Tensor) -> bool:
    return False


def lower(step: Step, context: Context) -> list[Launch]:
    raise NotImplementedError
