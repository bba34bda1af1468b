"""What the cost models that choose tiles say that a step takes. Needs no GPU.

Their constants are of an H100, in cycles at one clock; of another GPU nothing is said. The constants of products
on wgmma were fitted to shapes of the suite `gemm` (product_cost.py); those of the suite `random` were not among them.
"""

from __future__ import annotations

from engine.ir.dtype import DType
from engine.ir.ops import Attention, Gemm
from engine.plan.plan import Step
from engine.targets.cuda import attention, attention_short, attention_wgmma, attention_wgmma_tiles
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.attention import heads_of, sizes_of
from engine.targets.cuda.attention_tiles import cycles as portable_cycles
from engine.targets.cuda.attention_tiles import pick
from engine.targets.cuda.gemm import other_tiles, parts_of, pick_tile, ranked_tiles
from engine.targets.cuda.kernel import Context
from engine.targets.cuda.product_cost import CLOCK_MHZ


def predicted_us(step: Step, context: Context) -> float | None:
    """Microseconds of a matrix product or an attention in fp16, or a product of fp8; None for other steps, types and
    architectures."""
    if context.architecture is not SM_90A or step.inputs[0].dtype not in (DType.F16, DType.F8E4M3):
        return None
    if isinstance(step.op, Gemm):
        return _product_cycles(step, context) / CLOCK_MHZ
    if isinstance(step.op, Attention):
        return _attention_cycles(step, context) / CLOCK_MHZ
    return None


def _product_cycles(step: Step, context: Context) -> float:
    parts = parts_of(step, context)
    assert parts is not None, "these types are for the matrix units"
    product, epilogue = parts
    tile = pick_tile(product, epilogue, context)
    others = other_tiles(product, epilogue, context).values()
    every = [*ranked_tiles(product, context, epilogue.reads), *(one for tiles in others for one in tiles)]
    return next(one.estimate.cycles for one in every if one.tile == tile)


def _attention_cycles(step: Step, context: Context) -> float:
    decoding = attention.decoding_of(step, context)
    if decoding is not None:
        return decoding.cycles + attention_wgmma_tiles.LAUNCH
    if attention.short_is_faster(step, context):
        return attention_short.cycles(attention_wgmma.work_of(step), context.multiprocessors)
    if attention_wgmma.suits(step):
        tile = attention_wgmma.pick(step, context)
        return attention_wgmma_tiles.cycles(tile, attention_wgmma.work_of(step), context.multiprocessors)
    heads, sizes, architecture = heads_of(step, context), sizes_of(step), context.architecture
    portable, splits = pick(heads, sizes, architecture, context.multiprocessors)
    return portable_cycles(portable, splits, heads, sizes, architecture, context.multiprocessors)
