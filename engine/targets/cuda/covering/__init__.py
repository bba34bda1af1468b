"""The covering set: steps that between them make every kernel file, tile and functor shape that the engine can ask for.

The gate compiles it for every architecture; the GPU tests and benchmarks build their steps with `make_step`, too. No
device is needed to make them. A module each for the families that are covered tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.covering.attention import attention, attentions
from engine.targets.cuda.covering.block import block_op, block_step, blocks
from engine.targets.cuda.covering.build import (
    ACC,
    BIAS,
    BIAS_GELU,
    BIAS_RELU6,
    BIAS_RESIDUAL,
    F16,
    F32,
    I64,
    SCALE_SHIFT,
    Given,
    add,
    arg,
    channels_inner,
    constant,
    conv_op,
    gelu,
    make_step,
    mul,
    relu6,
    results_in,
    stored,
    weight,
)
from engine.targets.cuda.covering.conv import convolutions
from engine.targets.cuda.covering.depthwise import depthwise_products
from engine.targets.cuda.covering.excitation import excitation_step, excitations
from engine.targets.cuda.covering.gemm import few_rows, products
from engine.targets.cuda.covering.image import images
from engine.targets.cuda.covering.light import light_steps
from engine.targets.cuda.covering.stem import stems
from engine.targets.cuda.covering.usual import embedding_norm, layout_copy, recurrent_step, steps
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Launch, WeightStore

__all__ = [
    "ACC",
    "BIAS",
    "BIAS_GELU",
    "BIAS_RELU6",
    "BIAS_RESIDUAL",
    "F16",
    "F32",
    "I64",
    "SCALE_SHIFT",
    "Given",
    "add",
    "arg",
    "attention",
    "attentions",
    "block_op",
    "block_step",
    "blocks",
    "channels_inner",
    "constant",
    "conv_op",
    "convolutions",
    "depthwise_products",
    "embedding_norm",
    "excitation_step",
    "excitations",
    "few_rows",
    "gelu",
    "images",
    "launches",
    "layout_copy",
    "light_steps",
    "make_step",
    "mul",
    "products",
    "recurrent_step",
    "relu6",
    "results_in",
    "stems",
    "steps",
    "stored",
    "weight",
]


def launches(architecture: Architecture) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of everything in the covering set, with every tile of the matrix kernels."""
    context = Context(architecture, 128, WeightStore())
    for step in steps():
        for launch in family_of(step.op).lower(step, context):
            yield step.name, launch
    yield from images()
    yield from products(context)
    yield from few_rows(context)
    yield from attentions(context)
    yield from convolutions(context)
    yield from blocks(context)
    yield from stems(context)
    yield from depthwise_products(context)
    yield from excitations(context)
