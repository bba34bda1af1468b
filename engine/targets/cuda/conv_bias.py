"""A depthwise convolution's bias as what its sums begin with, instead of an addition in its epilogue
(depthwise_rows.py). Sums in fp32 are then rounded beside the bias, not before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.leading_bias import leading_bias
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, Tensor
from engine.targets.cuda.kernel import Context, is_constant


def without_bias(step: Step) -> tuple[Step, Tensor | None]:
    """A convolution whose stores take sums that have begun with a constant for each channel, and these constants; the
    step as it is and None where its stores do anything else with its sums."""
    assert isinstance(step.op, Conv)
    found = leading_bias(step.op.stores)
    if found is None:
        return step, None
    addition, added = found
    bias, result = step.inputs[added.index], step.outputs[0].shape
    channels = (result[1], *(1 for _ in result[2:]))
    if not is_constant(bias) or tuple(bias.shape) not in (channels, (1, *channels)):
        return step, None
    stores = tuple(ex.replaced(store, addition, ex.Acc()) for store in step.op.stores)
    return replace(step, op=replace(step.op, stores=stores)), bias


def packed_bias(bias: Tensor, channels: int, context: Context) -> Buffer:
    """fp32 [channels], zeros behind those that there are."""

    def pack(b: np.ndarray) -> np.ndarray:
        padded = np.zeros(channels, np.float32)
        padded[: b.size] = b.reshape(-1)
        return padded

    return context.weights.packed(bias, f"fp32 c{channels}", pack)
