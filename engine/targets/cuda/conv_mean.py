"""Depthwise convolutions that compute the mean over their pixels, too: `ConvMean`. In the kernels of rows
(depthwise_rows.py) sums come beside the result, a few for each image, and a small reduction joins them; elsewhere the
mean is taken of the stored result."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import ConvMean, Op, Reduce, ReduceKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda import conv, depthwise_rows, reduce
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_tiles import summed_tiles, taken
from engine.targets.cuda.depthwise_rows import ImageSums
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.kernel import Context, Launch


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Those of the convolution; means have any strides."""
    assert isinstance(op, ConvMean)
    given, results = conv.requirements(op.conv, inputs)
    return given, (*results, Requirement())


def lower(step: Step, context: Context) -> list[Launch]:
    bare = without_mean(step)
    tiles = summed_tiles(bare, Geometry(bare), context)
    if tiles:
        return lower_rows(step, taken(tiles, step, bare, context), context)
    return lower_apart(step, context)


def lower_apart(step: Step, context: Context) -> list[Launch]:
    """The convolution, then the mean of its stored result. Nothing but the mean itself may lie in the workspace."""
    assert isinstance(step.op, ConvMean)
    result, mean = step.outputs[0], step.outputs[-1]
    source, axes = ex.cast(ex.Arg(0, result.dtype), DType.F32), tuple(range(2, len(result.shape)))
    reduction = Reduce(ReduceKind.MEAN, axes, True, source, (step.op.mean,))
    averaged = replace(step, op=reduction, inputs=(result,), outputs=(mean,))
    pixels = prod(result.shape[2:])
    shared = mean.buffer.kind is not BufferKind.WORKSPACE
    return [
        *conv.lower(without_mean(step), context),
        *reduce.lower_reduction(averaged, reduction, result.shape, pixels, context, shared),
    ]


def without_mean(step: Step) -> Step:
    """The convolution alone."""
    assert isinstance(step.op, ConvMean)
    return replace(step, op=step.op.conv, outputs=step.outputs[:-1])


def lower_rows(step: Step, tile: RowsTile, context: Context) -> list[Launch]:
    """The launches of a step that `has_rows` in the given tile."""
    assert isinstance(step.op, ConvMean)
    bare, mean = without_mean(step), step.outputs[-1]
    geometry = Geometry(bare)
    sums = ImageSums.of(geometry, tile, context)
    joined = Tensor(mean.buffer, mean.dtype, mean.shape[:2], mean.strides[:2], mean.offset)
    reduction = Reduce(ReduceKind.MEAN, (1,), False, ex.Arg(0, DType.F32), (step.op.mean,))
    join = replace(step, op=reduction, inputs=(sums.tensor,), outputs=(joined,))
    pixels = prod(bare.outputs[0].shape[2:])
    # The sums lie in the step's workspace, where blocks that share a walk would leave theirs.
    return [
        depthwise_rows.launch_rows(bare, geometry, tile, context, sums),
        *reduce.lower_reduction(join, reduction, sums.tensor.shape, pixels, context, shared=False),
    ]
