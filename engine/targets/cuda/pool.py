"""Pooling over windows of any number of axes (pool.cuh). Windows that hold the whole image are reductions."""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.ops import Op, Pool, PoolKind, Reduce, ReduceKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Argument,
    Context,
    I64s,
    Launch,
    TensorArgument,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.reduce import extreme, lower_reduction
from engine.targets.cuda.spaces import VECTOR, check_counts, operand, operands, space

_THREADS = 128
_LARGE_WINDOW = 64  # taps from which a warp shares a window, where threads alone would not fill the GPU


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pool)
    if op.kind is PoolKind.AVERAGE and not inputs[0].dtype.is_float:
        raise UnsupportedOp(f"Pool: an average of {inputs[0].dtype.value}; cast to a float first")
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, y = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, Pool)
    if not y.elements:
        return []
    if _is_global(op, x.shape[2:], y.shape[2:]):
        return _lower_global(step, op, context)
    strides = operand(x, len(x.shape)).strides
    channels_inner = strides[1] == 1 or (x.shape[1] == 1 and strides[-1] != 1)
    order = channels_last(len(y.shape)) if channels_inner else tuple(range(len(y.shape)))
    columns, rows = y.shape[order[-1]], prod(y.shape[axis] for axis in order[:-1])
    width = VECTOR if channels_inner and columns > 1 else 1
    pieces = rows * ceildiv(columns, width)
    resident = context.multiprocessors * 1024
    shares = 32 if prod(op.kernel) >= _LARGE_WINDOW and pieces < resident else 1
    check_counts(y.shape, pieces * shares, *(s + b + e for s, (b, e) in zip(x.shape[2:], op.pads, strict=True)))
    vector = channels_inner and all(n % VECTOR == 0 for n in (columns, x.offset, strides[0], *strides[2:]))
    maximum = op.kind is PoolKind.MAX
    config: dict[str, int | bool | str] = {
        "width": width, "threads": _THREADS, "spatial": len(op.kernel), "shares": shares,
        "channels_inner": channels_inner, "operation": "Maximum" if maximum else "Sum", "mean": not maximum,
        "count_padding": op.count_include_pad, "x_vector": vector and width == VECTOR, "input_t": STORAGE[x.dtype],
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "x": TensorArgument(pointer_to(x), (), 1), "rows": rows, "columns": columns, "channels": x.shape[1],
        "batch_stride": I64(strides[0]), "channel_stride": I64(strides[1]), "stride": I64s(strides[2:]),
        "size": I64s(x.shape[2:]), "out": I64s(y.shape[2:]), "kernel": I64s(op.kernel), "step": I64s(op.strides),
        "dilation": I64s(op.dilations), "begin": I64s(tuple(begin for begin, _ in op.pads)),
        "end": I64s(tuple(end for _, end in op.pads)),
    }  # fmt: skip
    start = codegen.literal(extreme(x.dtype, lowest=True) if maximum else 0, x.dtype)
    identity = f"DEVICE {codegen.COMPUTE[x.dtype]} identity() {{ return {start}; }}\n"
    reads = operands(step.inputs, ex.arguments(*op.stores), (), len(y.shape))
    every = space(y.shape, order[:-1], order[-1:], [*reads.values(), *(operand(t, len(y.shape)) for t in step.outputs)])
    placed = iter(every.operands)
    loaded = {i: next(placed) for i in reads}
    epilogue = codegen.epilogue(op.stores, every, loaded, list(placed), columns, x.dtype)
    grid = (ceildiv(pieces * shares, _THREADS), 1, 1)
    return [launch("pool", "pool.cuh", config, [epilogue], arguments, grid, _THREADS, helpers=identity)]


def _is_global(op: Pool, image: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Whether the only window holds every pixel."""
    return all(
        out == 1 and (dilation == 1 or kernel == 1) and kernel - begin >= size
        for out, dilation, kernel, (begin, _), size in zip(output, op.dilations, op.kernel, op.pads, image, strict=True)
    )


def _lower_global(step: Step, op: Pool, context: Context) -> list[Launch]:
    x = step.inputs[0]
    image = x.shape[2:]
    counted = [
        min(kernel, begin + size + end) if op.count_include_pad else size
        for kernel, (begin, end), size in zip(op.kernel, op.pads, image, strict=True)
    ]
    kind = ReduceKind.MAX if op.kind is PoolKind.MAX else ReduceKind.MEAN
    reduction = Reduce(kind, tuple(range(2, len(x.shape))), True, ex.Arg(0, x.dtype), op.stores)
    return lower_reduction(step, reduction, x.shape, prod(counted), context)
