"""Pooling over windows, NHWC (pool.cuh)."""

from __future__ import annotations

from engine.errors import UnsupportedOp
from engine.ir.ops import Op, Pool, PoolKind
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.gemm import epilogue_of
from engine.targets.cuda.kernel import STORAGE, Argument, Context, Launch, TensorArgument, ceildiv, launch, pointer_to
from engine.targets.cuda.spaces import VECTOR, operand

_THREADS = 128


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Images in NHWC."""
    assert isinstance(op, Pool)
    if len(op.kernel) > 2 or not inputs[0].dtype.is_float:
        raise UnsupportedOp(f"Pool over {len(op.kernel)} axes of {inputs[0].dtype.value}: no CUDA kernel")
    image = Requirement(Access.INNER, channels_last(len(inputs[0].shape)))
    return (image, *(Requirement() for _ in inputs[1:])), tuple(image for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Pool)
    x, y = step.inputs[0], step.outputs[0]
    strides = operand(x, len(x.shape)).strides
    channels, rows = x.shape[1], y.elements // y.shape[1]
    walk = (strides[0], 0 if len(op.kernel) == 1 else strides[2], strides[-1])
    aligned = all(count % VECTOR == 0 for count in (channels, x.offset, *walk))
    (out_h, out_w), (in_h, in_w) = (1, *y.shape[2:])[-2:], (1, *x.shape[2:])[-2:]
    begins, ends = (0, *(b for b, _ in op.pads))[-2:], (0, *(e for _, e in op.pads))[-2:]
    kernel, steps, dilations = (1, *op.kernel)[-2:], (1, *op.strides)[-2:], (1, *op.dilations)[-2:]
    config: dict[str, int | bool | str] = {
        "width": VECTOR, "threads": _THREADS, "maximum": op.kind is PoolKind.MAX, "count_padding": op.count_include_pad,
        "x_vector": aligned, "input_t": STORAGE[x.dtype],
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "x": TensorArgument(pointer_to(x), walk, 1), "images": x.shape[0], "channels": channels, "in_h": in_h,
        "in_w": in_w, "out_h": out_h, "out_w": out_w, "kernel_h": kernel[0], "kernel_w": kernel[1],
        "stride_h": steps[0], "stride_w": steps[1], "dilation_h": dilations[0], "dilation_w": dilations[1],
        "pad_h": begins[0], "pad_w": begins[1], "pad_end_h": ends[0], "pad_end_w": ends[1],
    }  # fmt: skip
    epilogue = epilogue_of(step, op.stores, channels_last(len(y.shape)), channels)
    grid = (ceildiv(rows * ceildiv(channels, VECTOR), _THREADS), 1, 1)
    return [launch("pool", "pool.cuh", config, [epilogue], arguments, grid, _THREADS)]
