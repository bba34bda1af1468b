"""The covering set's inverted residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Conv, ConvBlock
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda.conv_block import estimates, launch_block
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.covering.build import ACC, F16, Given, add, arg, make_step, mul, relu6, stored, weight
from engine.targets.cuda.kernel import Context, Launch


def _silu(value: ex.Expr) -> ex.Expr:
    return mul(value, ex.apply(PointOp.SIGMOID, value))


def _as_it_is(value: ex.Expr) -> ex.Expr:
    return value


_ACTIVATIONS: Mapping[str, Callable[[ex.Expr], ex.Expr]] = {"relu6": relu6, "silu": _silu, "none": _as_it_is}
Pads = tuple[tuple[int, int], tuple[int, int]]


def block_op(
    expanded: int,
    kernel: int = 3,
    stride: int = 1,
    pads: Pads | None = None,
    residual: bool = False,
    dtype: DType = F16,
    activation: str = "relu6",
) -> ConvBlock:
    """An inverted residual with biases, inputs 4 to 6, and a residual, input 7; `activation`: relu6, silu or none,
    behind the first two convolutions. Without `pads` those that keep the size at stride 1."""
    act = _ACTIVATIONS[activation]
    one, half = (1, 1), kernel // 2
    last = add(ACC, arg(6, dtype))
    return ConvBlock(
        Conv(one, ((0, 0), (0, 0)), one, stores=(stored(act(add(ACC, arg(4, dtype))), dtype),)),
        Conv(
            (stride, stride), pads or ((half, half), (half, half)), one, expanded,
            stores=(stored(act(add(ACC, arg(5, dtype))), dtype),),
        ),
        Conv(one, ((0, 0), (0, 0)), one, stores=(stored(add(last, arg(7, dtype)) if residual else last, dtype),)),
    )  # fmt: skip


def block_step(
    image: tuple[int, int, int, int],
    expanded: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    pads: Pads | None = None,
    residual: bool = False,
    dtype: DType = F16,
    activation: str = "relu6",
) -> Step:
    """The step of a `block_op` on an image in NHWC."""
    op = block_op(expanded, kernel, stride, pads, residual, dtype, activation)
    filters = ((expanded, image[1], 1, 1), (expanded, 1, kernel, kernel), (outputs, expanded, 1, 1))
    biases = ((size, 1, 1) for size in (expanded, expanded, outputs))
    inputs: list[Given] = [(dtype, image), *(weight(*shape, dtype=dtype) for shape in (*filters, *biases))]
    if residual:
        inputs.append((dtype, image))
    step = make_step(op, inputs, f"block {image[1]} {expanded} {outputs} {kernel}x{kernel}/{stride} {activation}")
    given = {0, 7} if residual else {0}
    order = channels_last(4)
    inner = (replace(x, strides=row_major(x.shape, order)) if i in given else x for i, x in enumerate(step.inputs))
    result = replace(step.outputs[0], strides=row_major(step.outputs[0].shape, order))
    return replace(step, inputs=tuple(inner), outputs=(result,))


def blocks(context: Context) -> Iterator[tuple[str, Launch]]:
    """Tiles of every kind, each in one of several blocks."""
    steps = (
        block_step((4, 24, 28, 28), 144, 24, residual=True),
        block_step((4, 40, 28, 28), 240, 80, 5, 2, dtype=DType.BF16, activation="silu"),
        block_step((4, 96, 14, 14), 576, 160, activation="none"),
        block_step((4, 112, 14, 14), 672, 192, 5, residual=False, activation="silu"),
    )
    for turn, step in enumerate(steps):
        for tile in [choice.tile for choice in estimates(step, context)][turn % 2 :: 2]:
            yield f"{step.name} {tile}", launch_block(step, tile, context)
