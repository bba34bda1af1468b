"""Which module has the kernels of which operator. Adding a kernel family adds a line here and nowhere else."""

from __future__ import annotations

from engine.errors import UnsupportedOp
from engine.ir.ops import Attention, Conv, Gemm, Norm, Op, Pointwise, Reduce, Softmax
from engine.targets.cpu import attention, conv, gemm, norm, pointwise, reduce, softmax
from engine.targets.cpu.kernel import Family

FAMILIES: dict[type[Op], Family] = {
    Attention: attention,
    Conv: conv,
    Gemm: gemm,
    Norm: norm,
    Pointwise: pointwise,
    Reduce: reduce,
    Softmax: softmax,
}


def family_of(op: Op) -> Family:
    """The family that runs `op`. Raises UnsupportedOp where there is none."""
    family = FAMILIES.get(type(op))
    if family is None:
        raise UnsupportedOp(f"{op.name}: the CPU target has no kernel for this operator")
    return family
