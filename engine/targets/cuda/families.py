"""Which module has the kernels of which operator. Adding a kernel family adds a line here and nowhere else."""

from __future__ import annotations

from engine.errors import UnsupportedOp
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    Gather,
    Gemm,
    Norm,
    Op,
    Pad,
    Pointwise,
    Pool,
    Recurrent,
    Reduce,
    Resize,
    Running,
    Scatter,
    Softmax,
    TopK,
)
from engine.targets.cuda import (
    attention,
    concat,
    conv,
    gather,
    gemm,
    normalize,
    pad,
    pointwise,
    pool,
    recurrent,
    reduce,
    resize,
    running,
    scatter,
    top_k,
)
from engine.targets.cuda.kernel import Family

FAMILIES: dict[type[Op], Family] = {
    Attention: attention,
    Concat: concat,
    Conv: conv,
    Gather: gather,
    Gemm: gemm,
    Norm: normalize,
    Pad: pad,
    Pointwise: pointwise,
    Pool: pool,
    Recurrent: recurrent,
    Reduce: reduce,
    Resize: resize,
    Running: running,
    Scatter: scatter,
    Softmax: normalize,
    TopK: top_k,
}


def family_of(op: Op) -> Family:
    """The family that runs `op`. Raises UnsupportedOp where there is none."""
    family = FAMILIES.get(type(op))
    if family is None:
        raise UnsupportedOp(f"{op.name}: the CUDA target has no kernel for this operator")
    return family
