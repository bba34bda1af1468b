"""Depthwise convolutions with the squeeze-and-excite layers on their mean: `ConvExcitation`. What a kernel of
rows (depthwise_rows.py) leaves of an image's pixels, excitation.cuh adds up itself."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from engine.ir.ops import ConvExcitation, Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import conv_mean, depthwise_rows, excitation
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_tiles import summed_tiles, taken
from engine.targets.cuda.depthwise_rows import ImageSums
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.kernel import Context, Launch, workspace


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Those of both; the mean between them is nobody else's."""
    assert isinstance(op, ConvExcitation)
    given, (*results, _) = conv_mean.requirements(op.conv_mean, inputs[: op.given])
    images, channels = inputs[0].shape[0], inputs[0].shape[1]
    mean = _mean(images, channels, len(inputs[0].shape), op)
    (_, *others), gates = excitation.requirements(op.excitation, (mean, *inputs[op.given :]))
    return (*given, *others), (*results, *gates)


def lower(step: Step, context: Context) -> list[Launch]:
    convolution = with_mean(step)
    bare = conv_mean.without_mean(convolution)
    tiles = summed_tiles(bare, Geometry(bare), context)
    if tiles:
        return lower_rows(step, taken(tiles, step, bare, context), context)
    mean = convolution.outputs[-1]
    launches = conv_mean.lower_apart(convolution, context)
    return [*launches, *excitation.lower(replace(_layers(step), inputs=(mean, *_layers(step).inputs[1:])), context)]


def with_mean(step: Step) -> Step:
    """The convolution with its mean, which lies in the step's workspace."""
    op, result = step.op, step.outputs[0]
    assert isinstance(op, ConvExcitation)
    mean = _mean(result.shape[0], result.shape[1], len(result.shape), op)
    return replace(step, op=op.conv_mean, inputs=step.inputs[: op.given], outputs=(*step.outputs[:-1], mean))


def lower_rows(step: Step, tile: RowsTile, context: Context) -> list[Launch]:
    """The launches of a step that `has_rows` in the given tile."""
    bare = conv_mean.without_mean(with_mean(step))
    geometry = Geometry(bare)
    sums = ImageSums.of(geometry, tile, context)
    return [
        depthwise_rows.launch_rows(bare, geometry, tile, context, sums),
        excitation.launch_layers(_layers(step), sums.tensor, prod(bare.outputs[0].shape[2:]), context),
    ]


def _layers(step: Step) -> Step:
    """The two layers; in the mean's place something of its shape."""
    op = step.op
    assert isinstance(op, ConvExcitation)
    mean = with_mean(step).outputs[-1]
    return replace(step, op=op.excitation, inputs=(mean, *step.inputs[op.given :]), outputs=step.outputs[-1:])


def _mean(images: int, channels: int, rank: int, op: ConvExcitation) -> Tensor:
    dtype = op.conv_mean.mean.dtype
    shape = (images, channels, *(1 for _ in range(rank - 2)))
    return Tensor(workspace(images * channels * dtype.itemsize), dtype, shape, row_major(shape))
