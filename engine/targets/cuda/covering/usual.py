"""The covering set's steps in which the target chooses the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Cell,
    Gather,
    Gemm,
    Norm,
    NormKind,
    Pad,
    PadMode,
    Pointwise,
    Pool,
    PoolKind,
    Recurrent,
    Reduce,
    ReduceKind,
    Resize,
    ResizeMode,
    RowFactors,
    Running,
    RunningKind,
    Scatter,
    ScatterKind,
    Softmax,
    TopK,
)
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.covering.attention import attention
from engine.targets.cuda.covering.block import block_step
from engine.targets.cuda.covering.build import (
    ACC,
    BIAS,
    BIAS_GELU,
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
    results_in,
    stored,
    weight,
)
from engine.targets.cuda.covering.conv import max_step
from engine.targets.cuda.covering.excitation import excitation_steps
from engine.targets.cuda.covering.light import light_steps
from engine.targets.cuda.covering.stem import pooled_stem


def steps() -> Iterator[Step]:
    """Steps in which the target chooses the kernels."""
    yield make_step(Gemm((BIAS_GELU,)), [(F16, (4, 100, 384)), weight(384, 1536), weight(1536)], "gemm bias gelu")
    yield make_step(
        Gemm((BIAS_RESIDUAL,)), [(F16, (77, 384)), weight(384, 384), weight(384), (F16, (77, 384))], "gemm residual"
    )
    yield make_step(Gemm((BIAS,)), [(F16, (5, 63)), weight(63, 37), weight(37)], "gemm odd")
    for dtype, columns in ((F16, 768), (DType.BF16, 333)):
        step = RowFactors(1e-5, offsets=columns % 8 > 0)
        yield make_step(step, [(dtype, (200, columns))], f"row factors of {columns}")
    yield make_step(Gemm((stored(ACC),)), [(F16, (2, 3, 40, 64)), (F16, (2, 3, 64, 72))], "gemm batch")
    yield make_step(Gemm((ACC,)), [(F16, (2, 40, 33)), (F16, (2, 33, 17))], "gemm batch odd")
    for dtype in (F16, F32):
        a = Tensor(Buffer("input0", BufferKind.INPUT, 40 * 64 * 4), dtype, (40, 64), (1, 40))
        yield make_step(Gemm((stored(ACC, dtype),)), [a, (dtype, (64, 72))], f"gemm {dtype.value} column-major")
    yield make_step(Gemm((ACC,)), [(F32, (2, 3, 2, 4, 33)), (F32, (3, 1, 33, 17))], "gemm f32 odd")
    yield make_step(Gemm((ex.Acc(DType.F64),)), [(DType.F64, (2, 40, 33)), (DType.F64, (33, 17))], "gemm f64")
    yield make_step(Gemm((ex.Acc(DType.I32),)), [(DType.U8, (40, 33)), (DType.I8, (33, 17))], "gemm integers")
    image = (F16, (2, 64, 28, 28))
    yield make_step(conv_op(1), [image, weight(32, 64, 1, 1), weight(32, 1, 1)], "conv 1x1")
    yield make_step(
        conv_op(1, store=BIAS_RESIDUAL), [image, weight(64, 64, 1, 1), weight(64, 1, 1), image], "conv 1x1 residual"
    )
    yield make_step(conv_op(3), [image, weight(64, 64, 3, 3), weight(64, 1, 1)], "conv 3x3")
    yield make_step(conv_op(3, 2), [(F16, (2, 3, 32, 32)), weight(32, 3, 3, 3), weight(32, 1, 1)], "conv stem")
    yield make_step(conv_op(3, groups=4), [image, weight(64, 16, 3, 3), weight(64, 1, 1)], "conv grouped")
    yield max_step(F16)
    yield max_step(DType.BF16, 128)
    yield pooled_stem((F32, (2, 3, 60, 64)), (64, 3, 7, 7))
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        w = weight(64, 1, kernel, kernel)
        yield make_step(
            conv_op(kernel, stride, 64), [image, w, weight(64, 1, 1)], f"depthwise {kernel} stride {stride}"
        )
    four, w = (F16, (4, 64, 28, 28)), weight(64, 1, 7, 7)
    yield make_step(conv_op(7, 1, 64), [four, w, weight(64, 1, 1)], "depthwise 7, four images")
    yield block_step((5, 24, 27, 29), 136, 24, residual=True)
    yield block_step((5, 16, 30, 28), 96, 40, 5, 2, dtype=DType.BF16, activation="silu")
    yield from excitation_steps()
    for head, causal in ((32, False), (64, True), (128, False)):
        yield attention(F16, head, causal, bias=1)
    yield attention(F16, 64, False, bias=2, tokens=200)
    row = (F16, (4, 100, 384))
    residual = add(arg(0), arg(3))
    yield make_step(
        Norm(NormKind.LAYER, (2,), 1e-12, residual, stores=(SCALE_SHIFT,)),
        [row, weight(384), weight(384), row],
        "layer norm",
    )
    yield embedding_norm(4, 100, 384)
    yield make_step(Norm(NormKind.RMS, (1,), 1e-6, arg(0), stores=(stored(ACC),)), [(F16, (9, 4096))], "rms norm")
    yield make_step(Norm(NormKind.L2, (1,), 1e-12, arg(0), stores=(ACC,)), [(F16, (9, 384))], "l2 norm")
    yield make_step(Softmax(1, source=arg(0), stores=(ACC,)), [(F16, (9, 1000))], "softmax")
    yield make_step(Softmax(1, True, arg(0), (ACC,)), [(F16, (9, 999))], "log softmax")
    average = Reduce(ReduceKind.MEAN, (2, 3), False, arg(0), (stored(ACC),))
    yield make_step(average, [image], "global average")
    # Batches of as many loads as a thread has steps.
    for images, side in ((32, 7), (32, 5), (32, 2)):
        yield make_step(average, [channels_inner(images, 1280, side, side)], "global average, channels inside")
    yield make_step(
        Reduce(ReduceKind.SUM, (1,), False, mul(arg(0), arg(1)), (ACC,)), [row, (F16, (4, 100, 1))], "masked sum"
    )
    yield make_step(Reduce(ReduceKind.MAX, (1,), True, ex.Arg(0, I64), (ex.Acc(I64),)), [(I64, (9, 77))], "integer max")
    for kind in PoolKind:
        op_pool = Pool(kind, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), stores=(stored(ACC),))
        yield make_step(op_pool, [image], f"{kind.value} pool")
    yield make_step(Pointwise((stored(gelu(add(arg(0), arg(1)))),)), [row, (F16, (384,))], "pointwise")
    yield make_step(Pointwise((stored(arg(0, F32)),)), [(F32, (2, 3, 32, 32))], "cast")
    yield layout_copy(2, 32, 20, 20)
    ids = (I64, (4, 25))
    yield make_step(Gather(0), [(F16, (50, 64)), ids], "gather rows")
    yield make_step(Gather(1), [(F16, (4, 77)), ids], "gather elements")
    around = ((0, 0), (0, 0), (1, 1), (2, 2))
    rolled = ((0, 0), (0, 0), (1, -1), (2, -2))
    for mode in PadMode:
        yield make_step(Pad(rolled if mode is PadMode.ROLL else around, mode), [image], f"{mode.value} pad")
    inner = make_step(Pad(around), [channels_inner(2, 64, 28, 28)], "constant pad, channels inside")
    yield results_in(inner, channels_last(4))
    for resize in ResizeMode:
        by_two = Resize((2, 64, 56, 56), (1.0, 1.0, 2.0, 2.0), resize, stores=(stored(ACC),))
        inner = make_step(by_two, [channels_inner(2, 64, 28, 28)], f"resize {resize.value}")
        yield results_in(inner, channels_last(4))
        yield make_step(by_two, [image], f"resize {resize.value}, channels outside")
    places: Given = np.random.default_rng(0).permutation(50)[:20, None]  # one that comes twice is in no order
    yield make_step(Scatter(None), [(F16, (50, 64)), places, (F16, (20, 64))], "scatter rows")
    yield make_step(Scatter(None, ScatterKind.ADD), [(F16, (50, 64)), places, (F16, (20, 64))], "scatter sum")
    yield make_step(Scatter(1, ScatterKind.MAX), [(F32, (9, 77)), (I64, (9, 20)), (F32, (9, 20))], "scatter maximum")
    yield make_step(TopK(1, 5), [(F16, (4, 1000))], "top 5")
    yield make_step(TopK(0, 1024, False), [(F32, (3000, 2))], "lowest 1024")
    yield make_step(TopK(1, 2000), [(F32, (2, 3000))], "top 2000")
    yield make_step(Running(RunningKind.SUM, 1), [(I64, (4, 1000))], "running sum")
    yield make_step(Running(RunningKind.PROD, 0, True, True), [(F16, (50, 9000))], "running products side by side")
    yield recurrent_step(Cell.LSTM, 64, F16)
    yield recurrent_step(Cell.LSTM, 1024, F16)
    yield recurrent_step(Cell.GRU, 512, F32)
    yield recurrent_step(Cell.RNN_TANH, 33, F16)
    yield from light_steps()
    mask = mul(ex.apply(PointOp.SUB, constant(1.0), ex.cast(ex.Arg(0, I64), F32)), constant(-65504.0))
    yield make_step(Pointwise((mask,)), [(I64, (4, 1, 1, 100))], "mask")


def recurrent_step(cell: Cell, hidden: int, dtype: DType) -> Step:
    """A recurrent network of 20 steps in both directions, batch 8."""
    state: Given = (dtype, (2, 8, hidden))
    inputs: list[Given] = [
        (dtype, (20, 2, 8, cell.gates * hidden)), weight(2, cell.gates * hidden, hidden, dtype=dtype), state,
    ]  # fmt: skip
    inputs += [state] if cell is Cell.LSTM else []
    inputs += [(dtype, (2, hidden))] if cell is Cell.GRU else []
    return make_step(Recurrent(cell, 1), inputs, f"{cell.value} {hidden}")


def embedding_norm(batch: int, sequence: int, features: int) -> Step:
    """Layer norm of the sum of word, position and type embeddings: BERT's first step."""
    source = add(add(arg(0), arg(1)), arg(2))
    store = stored(add(mul(ACC, arg(4)), arg(5)))
    op = Norm(NormKind.LAYER, (2,), 1e-12, source, ((0, 3), (2, 6)), (store,))
    ids = (I64, (batch, sequence))
    tables = [weight(1000, features), weight(1, sequence, features), weight(2, features)]
    return make_step(op, [*tables, ids, weight(features), weight(features), ids], "embedding norm")


def layout_copy(n: int, c: int, h: int, w: int) -> Step:
    """NHWC to NCHW."""
    return make_step(Pointwise((ex.Arg(0, F16),)), [channels_inner(n, c, h, w)], "layout copy")
