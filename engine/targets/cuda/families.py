"""Which module has the kernels of which operator, and what the passes may know of them. Adding a kernel family adds a
line here and nowhere else."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    ConvBlock,
    ConvExcitation,
    ConvMax,
    ConvMean,
    Excitation,
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
    RowFactors,
    Running,
    Scatter,
    Softmax,
    TopK,
)
from engine.passes.traits import PackedAttention, Traits
from engine.targets.cuda import (
    attention,
    attention_wgmma,
    concat,
    conv,
    conv_block,
    conv_excitation,
    conv_max,
    conv_mean,
    excitation,
    gather,
    gemm,
    normalize,
    pad,
    pointwise,
    pool,
    recurrent,
    reduce,
    resize,
    row_factors,
    running,
    scatter,
    top_k,
)
from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import Family

FAMILIES: dict[type[Op], Family] = {
    Attention: attention,
    Concat: concat,
    Conv: conv,
    ConvBlock: conv_block,
    ConvExcitation: conv_excitation,
    ConvMax: conv_max,
    ConvMean: conv_mean,
    Excitation: excitation,
    Gather: gather,
    Gemm: gemm,
    Norm: normalize,
    Pad: pad,
    Pointwise: pointwise,
    Pool: pool,
    Recurrent: recurrent,
    Reduce: reduce,
    Resize: resize,
    RowFactors: row_factors,
    Running: running,
    Scatter: scatter,
    Softmax: normalize,
    TopK: top_k,
}

TRAITS = Traits(
    channels_last=True,
    attention_types=frozenset({DType.F16, DType.BF16, DType.F32}),  # fp64 is two products and a softmax
    storage_type=DType.F16,
    product_types=frozenset({DType.F8E4M3, DType.I8}),
    permuted_rows=True,
    windows=True,
    gathered_norms=True,
)

PACKED = PackedAttention(
    types=frozenset({DType.F16, DType.BF16}),
    multiple=8,
    widest=attention_wgmma.MAX_WIDTH,
    sequences=attention_wgmma.MAX_SEQUENCES,
    by_default=False,
)
"""Of attention_wgmma.cuh. If asked for: large batches gain where they stay on the device (BERT 1.24 to 1.5 times the
padded peer over max / mean at 128 sequences; 6 to 12 % of a run from and to the host), but a run of MiniLM with one
sequence of 128 tokens takes longer on packed tokens than padded."""


def traits_of(architecture: Architecture) -> Traits:
    """The traits of a GPU. Squeeze-and-excite is made part of the depthwise layers before it where a kernel adds up
    pixels while it convolves: alone, its layers in one launch are slower than two products (EfficientNet-B0 on an H100:
    803 µs instead of 780 at batch 32; all together 718)."""
    if not architecture.wgmma:
        return TRAITS
    joined = replace(TRAITS, conv_means=True, conv_maxima=True, conv_blocks=conv_block.LIMITS, excitations=True)
    return replace(joined, packed=PACKED, scaled_weights=True, divided_rows=True)


def family_of(op: Op) -> Family:
    """The family that runs `op`. Raises UnsupportedOp where there is none."""
    family = FAMILIES.get(type(op))
    if family is None:
        raise UnsupportedOp(f"{op.name}: the CUDA target has no kernel for this operator")
    return family
