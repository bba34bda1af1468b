"""What the attention kernels are told of their operands, whichever instructions they are built around. Called by
`attention.py` and `attention_wgmma.py`."""

from __future__ import annotations

from enum import IntEnum
from math import e, log2

from engine.ir import expr as ex
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import Argument, Functor, I64s, pointer_to
from engine.targets.cuda.spaces import operand, operands, space

LOG2_E = log2(e)


class BiasKind(IntEnum):
    """What the bias of the scores depends on, beside batch and head. In the order of attention_mma.cuh."""

    NONE = 0
    PER_KEY = 1
    FULL = 2


def operation(step: Step) -> Attention:
    assert isinstance(step.op, Attention)
    return step.op


def four(values: tuple[int, ...], head: int) -> tuple[int, ...]:
    """Shape or strides with a head axis."""
    return values if len(values) == 4 else (values[0], head, *values[1:])


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides along batch, head, position and feature; 0 where an axis is broadcast or missing."""
    return four(operand(tensor, len(tensor.shape)).strides, 0)


def sharing(step: Step, which: int) -> int:
    """How many heads of q share one of input `which`."""
    return four(step.outputs[0].shape, 1)[1] // four(step.inputs[which].shape, 1)[1]


def bias_strides(step: Step) -> tuple[int, ...]:
    return four(operand(step.inputs[3], len(step.outputs[0].shape)).strides, 0)


def bias_kind(step: Step) -> BiasKind:
    if not operation(step).has_bias:
        return BiasKind.NONE
    return BiasKind.PER_KEY if bias_strides(step)[2] == 0 else BiasKind.FULL


def bias_arguments(step: Step) -> dict[str, Argument]:
    if not operation(step).has_bias:
        return {}
    return {"bias": pointer_to(step.inputs[3]), "bias_stride": I64s(bias_strides(step))}


def bias_code(step: Step) -> str:
    """The struct `Bias` that the kernels call."""
    if not operation(step).has_bias:
        return """struct Bias {
  DEVICE static float at(const Params&, u32, u32, u32, u32) { return 0.0f; }
};
"""
    return """struct Bias {
  DEVICE static float at(const Params& p, u32 batch, u32 head, u32 query, u32 key) {
    const i64* stride = p.bias_stride;
    return widen(p.bias[batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3]]);
  }
};
"""


def epilogue(step: Step) -> Functor:
    """Rows of the kernels run over batch, head and query."""
    shape, stores = step.outputs[0].shape, operation(step).stores
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    rows = space(shape, range(len(shape) - 1), (len(shape) - 1,), [*reads.values(), *writes])
    placed = dict(zip(reads, rows.operands, strict=False))
    return codegen.epilogue(stores, rows, placed, rows.operands[len(reads) :], rows.columns)
