"""The covering set: steps that between them make every kernel file, tile and functor shape that the engine can ask for.

The gate compiles it for every architecture; the GPU tests and benchmarks build their steps with `make_step`, too. No
device is needed to make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Attention,
    Cell,
    Conv,
    Gather,
    Gemm,
    Norm,
    NormKind,
    Op,
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
    Running,
    RunningKind,
    Scatter,
    ScatterKind,
    Softmax,
    TopK,
)
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import attention_wgmma, conv_halo, conv_stem, conv_wgmma
from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.attention import heads_of, launch_attention
from engine.targets.cuda.attention_tiles import Heads, candidates
from engine.targets.cuda.attention_wgmma_tiles import candidates as candidates_on_warpgroups
from engine.targets.cuda.conv import filters_of, launch_conv, lower_in
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_stem import is_stem, launch_stem, pairs_of
from engine.targets.cuda.depthwise import is_depthwise_product, launch_depthwise_product
from engine.targets.cuda.families import family_of
from engine.targets.cuda.gemm import epilogue_of, launch_product, operands_of
from engine.targets.cuda.gemm_stream import stream_tile
from engine.targets.cuda.image import Filter, centre_box, launch_images
from engine.targets.cuda.kernel import Context, Launch, WeightStore
from engine.targets.cuda.product import product_of
from engine.targets.cuda.tiles import MMA_TILES, WGMMA_TILES, MmaTile, Tile, WgmmaTile

F16, F32, I64 = DType.F16, DType.F32, DType.I64
ACC = ex.Acc()
Given: TypeAlias = tuple[DType, tuple[int, ...]] | np.ndarray | Tensor


def make_step(op: Op, inputs: Sequence[Given], name: str = "step") -> Step:
    """A step of `op` alone: operands where (dtype, shape) is given, constants where an array is, tensors as they are.

    Operands and results lie densely in the order that the kernels ask for.
    """
    tensors = [_tensor(i, given) for i, given in enumerate(inputs)]
    needs, results = family_of(op).requirements(op, tuple(tensors))
    placed = tuple(
        replace(tensor, strides=row_major(tensor.shape, need.order or None)) if isinstance(given, tuple) else tensor
        for tensor, need, given in zip(tensors, needs, inputs, strict=True)
    )
    outputs = tuple(
        _fresh(
            f"output{i}", BufferKind.OUTPUT, dtype, tuple(size for size in shape if isinstance(size, int)), need.order
        )
        for i, ((dtype, shape), need) in enumerate(zip(op.infer(placed), results, strict=True))
    )
    return Step(name, op, placed, outputs, op.cost(placed, outputs))


def recurrent_step(cell: Cell, hidden: int, dtype: DType) -> Step:
    """A recurrent network of 20 steps in both directions, batch 8."""
    state: Given = (dtype, (2, 8, hidden))
    inputs: list[Given] = [
        (dtype, (20, 2, 8, cell.gates * hidden)), weight(2, cell.gates * hidden, hidden, dtype=dtype), state,
    ]  # fmt: skip
    inputs += [state] if cell is Cell.LSTM else []
    inputs += [(dtype, (2, hidden))] if cell is Cell.GRU else []
    return make_step(Recurrent(cell, 1), inputs, f"{cell.value} {hidden}")


def results_in(step: Step, order: tuple[int, ...]) -> Step:
    """The same step with its results' axes in `order`, from the outermost to the innermost."""
    return replace(step, outputs=tuple(replace(t, strides=row_major(t.shape, order)) for t in step.outputs))


def _tensor(i: int, given: Given) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        data = np.ascontiguousarray(given)
        buffer = Buffer(f"constant{i}", BufferKind.CONSTANT, data.nbytes, data)
        return Tensor(buffer, DType.of(data.dtype), data.shape, row_major(data.shape))
    return _fresh(f"input{i}", BufferKind.INPUT, given[0], given[1], ())


def _fresh(name: str, kind: BufferKind, dtype: DType, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    return Tensor(Buffer(name, kind, prod(shape) * dtype.itemsize), dtype, shape, row_major(shape, order or None))


def weight(*shape: int, dtype: DType = F16) -> np.ndarray:
    """A random constant; a matrix [k, n] or a filter [n, c, …] keeps unit variance."""
    rng = np.random.default_rng(shape)
    fan_in = shape[0] if len(shape) == 2 else prod(shape[1:])
    scaled: np.ndarray = rng.standard_normal(shape) / np.sqrt(max(1, fan_in))
    return scaled.astype(dtype.numpy)


def arg(index: int, dtype: DType = F16) -> ex.Expr:
    """Input `index` in fp32."""
    return ex.cast(ex.Arg(index, dtype), F32)


def stored(value: ex.Expr, dtype: DType = F16) -> ex.Expr:
    return ex.cast(value, dtype)


def constant(value: float) -> ex.Expr:
    return ex.Const(value, F32)


def relu6(value: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.MIN, ex.apply(PointOp.MAX, value, constant(0.0)), constant(6.0))


def gelu(value: ex.Expr) -> ex.Expr:
    erf = ex.apply(PointOp.ERF, ex.apply(PointOp.MUL, value, constant(0.7071067811865476)))
    return ex.apply(PointOp.MUL, ex.apply(PointOp.MUL, value, constant(0.5)), add(erf, constant(1.0)))


def add(a: ex.Expr, b: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.ADD, a, b)


def mul(a: ex.Expr, b: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.MUL, a, b)


BIAS = stored(add(ACC, arg(2)))
BIAS_GELU = stored(gelu(add(ACC, arg(2))))
BIAS_RELU6 = stored(relu6(add(ACC, arg(2))))
BIAS_RESIDUAL = stored(add(add(ACC, arg(2)), arg(3)))
SCALE_SHIFT = stored(add(mul(ACC, arg(1)), arg(2)))


def conv_op(kernel: int, stride: int = 1, groups: int = 1, store: ex.Expr = BIAS_RELU6, dilation: int = 1) -> Conv:
    """A 2-D convolution with "same" padding at stride 1."""
    pad = (kernel - 1) * dilation // 2
    return Conv((stride, stride), ((pad, pad), (pad, pad)), (dilation, dilation), groups, stores=(store,))


def steps() -> Iterator[Step]:
    """Steps in which the target chooses the kernels."""
    yield make_step(Gemm((BIAS_GELU,)), [(F16, (4, 100, 384)), weight(384, 1536), weight(1536)], "gemm bias gelu")
    yield make_step(
        Gemm((BIAS_RESIDUAL,)), [(F16, (77, 384)), weight(384, 384), weight(384), (F16, (77, 384))], "gemm residual"
    )
    yield make_step(Gemm((BIAS,)), [(F16, (5, 63)), weight(63, 37), weight(37)], "gemm odd")
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
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        w = weight(64, 1, kernel, kernel)
        yield make_step(
            conv_op(kernel, stride, 64), [image, w, weight(64, 1, 1)], f"depthwise {kernel} stride {stride}"
        )
    for head, causal in ((32, False), (64, True), (128, False)):
        yield attention(F16, head, causal, bias=1)
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
    yield make_step(Reduce(ReduceKind.MEAN, (2, 3), False, arg(0), (stored(ACC),)), [image], "global average")
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


_LIGHT_TYPES = (F16, DType.BF16, F32, DType.F64)


def light_steps() -> Iterator[Step]:
    """Every kernel of the light families beside the usual ones: other types, axes, lengths, layouts."""

    def wide(dtype: DType, index: int = 0) -> ex.Expr:
        return ex.cast(ex.Arg(index, dtype), DType.F64 if dtype is DType.F64 else F32)

    def plain(dtype: DType) -> ex.Expr:
        return stored(ex.Acc(DType.F64 if dtype is DType.F64 else F32), dtype)

    shapes = (((9, 5), 1), ((9, 3000), 1), ((3, 40_000), 1), ((1, 9000), 0), ((200, 9), 0), ((9000, 9), 0))
    for i, (shape, axis) in enumerate(shapes):
        kind, dtype, other = list(NormKind)[i % 3], _LIGHT_TYPES[i % 4], _LIGHT_TYPES[(i + 2) % 4]
        norm = Norm(kind, (axis,), 1e-5, wide(dtype), stores=(plain(dtype),))
        yield make_step(norm, [(dtype, shape)], f"{kind.value} norm {dtype.value} {shape}")
        softmax = Softmax(axis, i % 2 == 1, wide(other), (plain(other),))
        yield make_step(softmax, [(other, shape)], f"softmax {other.value} {shape}")
    image = Tensor(Buffer("input0", BufferKind.INPUT, 1 << 20), F16, (2, 4, 16, 9, 9), (5184, 16, 1, 576, 64))
    for axes in ((2, 3, 4), (0, 3, 4)):
        group = Norm(NormKind.LAYER, axes, 1e-5, arg(0), stores=(SCALE_SHIFT,))
        yield make_step(group, [image, weight(4, 16, 1, 1), weight(4, 16, 1, 1)], f"norm over {axes}")

    for i, (shape, axis) in enumerate((*shapes, ((2000, 40), 1), ((3, 100_000), 1))):
        for dtype in (_LIGHT_TYPES[i % 4], (DType.I32, DType.U8, DType.U64, DType.BOOL)[i % 4])[: 1 + (i > 3)]:
            kinds = (ReduceKind.MAX, ReduceKind.MIN) if dtype is DType.BOOL else list(ReduceKind)
            source, store = (wide(dtype), plain(dtype)) if dtype.is_float else (ex.Arg(0, dtype), ex.Acc(dtype))
            reduce = Reduce(kinds[i % len(kinds)], (axis,), False, source, (store,))
            yield make_step(reduce, [(dtype, shape)], f"{reduce.kind.value} {dtype.value} {shape}")

    for dtype, (c, h) in zip(_LIGHT_TYPES, ((144, 56), (32, 112), (144, 56), (144, 56)), strict=True):
        inner = Tensor(Buffer("input0", BufferKind.INPUT, 8 * c * h * h), dtype, (1, c, h, h), (1, 1, h * c, c))
        average = Reduce(ReduceKind.MEAN, (2, 3), True, wide(dtype), (plain(dtype),))
        yield make_step(average, [inner], f"average of an image of {dtype.value}, channels inside")

    for i, spatial in enumerate((1, 2, 3, 2)):
        kernel = 15 if i == 3 else 3
        for dtype in (_LIGHT_TYPES[i], DType.U8)[: 1 + (i == 1)]:
            pooled = PoolKind.AVERAGE if i % 2 and dtype.is_float else PoolKind.MAX
            ones, twos = (1,) * spatial, (2,) * spatial
            store = plain(dtype) if dtype.is_float else ex.Acc(dtype)
            pool = Pool(pooled, (kernel,) * spatial, twos, ((1, 1),) * spatial, ones, True, i > 1, (store,))
            sizes = (2, 12, *(17,) * spatial)
            inner = Tensor(
                Buffer("input0", BufferKind.INPUT, 1 << 20), dtype, sizes, row_major(sizes, channels_last(len(sizes)))
            )
            yield make_step(pool, [inner if i % 2 else (dtype, sizes)], f"{spatial}-D pool {dtype.value}")

    for dtype in _LIGHT_TYPES[2:]:
        chain: ex.Expr = ex.Arg(0, dtype)
        # Sines of arguments above 10⁵ take 40 bytes of local memory, which is no spill.
        functions = sorted(ex.UNARY_FLOAT - {PointOp.SIN, PointOp.COS, PointOp.TAN}, key=lambda op: op.value)
        for op in (*functions, PointOp.SIGN, PointOp.FLOOR, PointOp.ROUND):
            chain = ex.apply(op, chain)
        for op in (PointOp.POW, PointOp.MOD, PointOp.FMOD, PointOp.MIN, PointOp.MAX):
            chain = ex.apply(op, chain, ex.Arg(0, dtype))
        tests = ex.apply(PointOp.OR, ex.apply(PointOp.ISNAN, chain), ex.apply(PointOp.ISINF, chain))
        yield make_step(Pointwise((chain, tests)), [(dtype, (3, 5))], f"functions of {dtype.value}")
    for dtype in (I64, DType.U32, DType.I8):
        number: ex.Expr = ex.Arg(0, dtype)
        operators = "add sub mul div pow min max mod fmod bitand bitor bitxor shl shr"
        for op in map(PointOp, operators.split()):
            number = ex.apply(op, number, ex.Arg(0, dtype))
        for op in (PointOp.NEG, PointOp.ABS, PointOp.SIGN, PointOp.BITNOT):
            number = ex.apply(op, number)
        yield make_step(Pointwise((number, ex.cast(number, F16))), [(dtype, (3, 5))], f"operators on {dtype.value}")
    strides = row_major((3, 4, 3, 4, 3, 9), (3, 1, 4, 0, 2, 5))
    deep = Tensor(Buffer("input0", BufferKind.INPUT, 1 << 14), F16, (2, 3, 2, 3, 2, 8), strides)
    yield make_step(Pointwise((ex.Arg(0, F16),)), [deep], "copy of many levels")
    for dtype in (DType.U8, F32, DType.F64):
        turned = Tensor(Buffer("input0", BufferKind.INPUT, 1 << 20), dtype, (3, 70, 90), (6300, 1, 70))
        yield make_step(Pointwise((ex.Arg(0, dtype),)), [turned], f"transposing copy {dtype.value}")


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


def channels_inner(n: int, c: int, h: int, w: int) -> Tensor:
    """An image in NHWC."""
    buffer = Buffer("input0", BufferKind.INPUT, 2 * n * c * h * w)
    return Tensor(buffer, F16, (n, c, h, w), row_major((n, c, h, w), channels_last(4)))


def attention(dtype: DType, head: int, causal: bool, bias: int, tokens: int = 100, bias_dtype: DType = F32) -> Step:
    """Attention without a bias (0), with one for every key (1), or for every score (2)."""
    heads: tuple[DType, tuple[int, ...]] = (dtype, (2, 4, tokens, head))
    inputs: list[Given] = [heads, heads, heads]
    inputs += [(bias_dtype, (2, 1, tokens if bias == 2 else 1, tokens))] if bias else []
    op = Attention(head**-0.5, causal, bias > 0, stores=(stored(ACC, dtype),))
    return make_step(op, inputs, f"attention {dtype.value} {head}{' causal' * causal}{' bias' * (bias > 0)}")


def packed_attention(head: int, causal: bool, sequences: int = 3, tokens: int = 200) -> Step:
    """Attention on sequences that lie one after the other."""
    heads: tuple[DType, tuple[int, ...]] = (F16, (1, 4, tokens, head))
    op = Attention(head**-0.5, causal, stores=(stored(ACC),), packed=True)
    inputs: list[Given] = [heads, heads, heads, (DType.I32, (sequences + 1,))]
    return make_step(op, inputs, f"attention packed {head}{' causal' * causal}")


def attentions(context: Context) -> Iterator[tuple[str, Launch]]:
    """Attention in every kind of tile and operands; masks, biases, unaligned heads and splits take turns."""
    turn = 0
    for dtype, tf32 in ((F16, False), (DType.BF16, False), (F32, True), (F32, False)):
        for head in (64, 128, 256):
            shape = Heads(head, head, dtype.itemsize, dtype is F32 and not tf32)
            for tile in candidates(shape, causal=False, full_bias=False):
                # Two warps compile as one or four do, bf16 as fp16.
                if tile.warps != 2 and (dtype is not DType.BF16 or tile.warps == 4):
                    turn += 1
                    odd, splits = turn % 4 == 0, 1 if turn % 3 else 4
                    # The tile of two fragments is not for wide heads with masks or full biases.
                    causal, bias = (turn % 2 == 0, turn % 3) if tile.fragments == 1 else (False, 1)
                    step = attention(dtype, head - odd, causal, bias)
                    sizes = heads_of(step, replace(context, tf32=tf32))
                    for launch in launch_attention(step, sizes, tile, splits):
                        yield step.name, launch
    if context.architecture.wgmma:
        # Without a mask, with a causal one, and with one that may hide whole tiles of keys.
        kinds = ((False, 0), (True, 1), (False, 1))
        for head, (causal, bias) in product((32, 64, 80, 96, 128, 192, 256), kinds):
            turn += 1
            dtype = DType.BF16 if turn % 4 == 0 else F16
            step = attention(dtype, head, causal, bias, tokens=200)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, dtype in ((64, F16), (64, F32), (96, DType.BF16), (128, F16), (192, F32), (256, F16)):
            step = attention(F16, head, head == 96, bias=2, tokens=200, bias_dtype=dtype)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, causal in ((64, False), (64, True), (96, True), (128, False), (192, True), (256, False)):
            step = packed_attention(head, causal)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)


def images() -> Iterator[tuple[str, Launch]]:
    """Image preprocessing for every filter, in both layouts and types."""
    pixels = Buffer("pixels", BufferKind.INPUT, 300 * 400 * 3)
    for filter_, dtype in zip(Filter, (F16, F32), strict=True):
        output = _fresh("output0", BufferKind.OUTPUT, dtype, (1, 3, 224, 224), channels_last(4))
        box = centre_box(0, 300, 400, 256, (224, 224))
        yield f"image {filter_.name.lower()}", launch_images(pixels, [box], output, (0, 0, 0), (1, 1, 1), filter_)


def launches(architecture: Architecture) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of everything in the covering set, with every tile of the matrix kernels."""
    context = Context(architecture, 128, WeightStore())
    for step in steps():
        for launch in family_of(step.op).lower(step, context):
            yield step.name, launch
    yield from images()
    yield from products(context)
    yield from attentions(context)
    yield from convolutions(context)
    yield from stems(context)
    yield from depthwise_products(context)


def convolutions(context: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products in every tile, whole and split, with every kind of operands, geometry and access to the image;
    computed filters; and what the matrix units do not take."""
    portable = [tile for tile in MMA_TILES if tile.shared_bytes <= context.architecture.shared_bytes]
    split, bf16 = [replace(tile, splits=3) for tile in portable], DType.BF16
    rounding = replace(context, tf32=True)
    chosen: list[tuple[Step, Context, Sequence[MmaTile]]] = [
        (_conv(F16), context, portable),
        (_conv(F16, channels=6, axes=3, residual=True), context, (split[0], split[-1])),
        (_conv(bf16, transposed=True, residual=True), context, (split[1], portable[0])),
        (_conv(F32), context, portable),
        (_conv(F32, channels=6, axes=3, transposed=True, residual=True), context, (split[0], portable[-1])),
        (_conv(F32, axes=3), rounding, (portable[0],)),
        (_conv(F16, channels=12, image=F32), context, (portable[0],)),
    ]
    for step, how, tiles in chosen:
        geometry = Geometry(step)
        filters, _ = filters_of(step, geometry, how)
        for tile in tiles:
            yield f"conv {tile}", launch_conv(step, geometry, filters, tile, how)
    yield from _gathered_convolutions(context, rounding)
    for step in (
        _conv(F16, known=False),
        _conv(F32, transposed=True, known=False),
        _conv(DType.F64),
        _conv(F32, channels=1, axes=3),
        *(_conv(F16, groups=groups, transposed=transposed) for groups in (128, 129) for transposed in (False, True)),
        _conv(bf16, groups=128, kernel=9),
        _conv(bf16, groups=128, kernel=7),
        _conv(F32, groups=128, kernel=5),
        _conv(F32, groups=32, channels=64, known=False),
    ):
        for launch in family_of(step.op).lower(step, context):
            yield "conv", launch


def _gathered_convolutions(context: Context, rounding: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products whose patches the copy engine gathers, in every tile: widths of panels take turns."""
    wgmma = [
        replace(tile, panel_bytes=128 >> i % 3)
        for i, tile in enumerate(WGMMA_TILES if context.architecture.wgmma else ())
    ]
    split = [replace(tile, splits=3) for tile in wgmma if tile.most_splits > 1]
    every = [replace(tile, panel_bytes=128) for tile in wgmma]
    few = (*wgmma[:2], *wgmma[7:9])
    chosen: list[tuple[Step, Context, Sequence[Tile]]] = [
        (_conv(F16), context, wgmma),
        (_residual(F16), context, every),
        (_residual(F16), context, split),
        (_residual(F16, axes=3), context, few),
        (_residual(F16, channels=128, groups=2), context, few),
        (_residual(DType.BF16), context, wgmma[:1]),
        (_residual(F32), rounding, (*wgmma[:3], *wgmma[7:8])),
        (_residual(F32, channels=128, groups=2, axes=3), rounding, split),
    ]
    for step, how, tiles in chosen:
        for tile in tiles:
            if isinstance(tile, WgmmaTile) and not conv_wgmma.has_registers(tile, Geometry(step)):
                continue
            for launch in lower_in(step, Geometry(step), tile, how):
                yield f"conv {tile}", launch
    if context.architecture.wgmma:
        yield from _halos(context, rounding)


def _halos(context: Context, rounding: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products that read a tile's pixels once, in every tile: the length of a ring is only a number."""
    for step, how in ((_conv(F16), context), (_residual(DType.BF16), context), (_residual(F32, channels=32), rounding)):
        for tile in conv_halo.candidates(step, Geometry(step), how):
            if tile.stages > 2:
                continue
            for launch in lower_in(step, Geometry(step), tile, how):
                yield f"conv {tile}", launch


def _residual(dtype: DType, channels: int = 0, groups: int = 1, axes: int = 2) -> Step:
    """A convolution with a residual that lies as the result does."""
    step = _conv(dtype, channels, groups, axes=axes, residual=True)
    *others, residual = step.inputs
    strides = row_major(residual.shape, channels_last(len(residual.shape)))
    return replace(step, inputs=(*others, replace(residual, strides=strides)))


def stems(context: Context) -> Iterator[tuple[str, Launch]]:
    """Images with few channels in every kind of tile: k in pairs of a table or regular, channels padded or not, images
    as they come; and patches."""
    photo, gray = (F32, (8, 3, 224, 224)), (F16, (8, 1, 96, 96))
    bf16, inner = DType.BF16, channels_inner(8, 3, 224, 224)
    chosen: list[tuple[Given, Sequence[int], DType, int, int]] = [  # image, filter, type, stride, dilation
        (photo, (64, 3, 7, 7), F16, 2, 1),
        (inner, (64, 3, 7, 7), F16, 2, 1),
        (photo, (32, 3, 3, 3), F16, 2, 1),
        (photo, (64, 3, 3, 3), bf16, 1, 1),
        (inner, (96, 3, 4, 4), F16, 4, 1),
        (photo, (64, 3, 11, 11), F16, 4, 1),
        (photo, (24, 3, 3, 3), bf16, 2, 2),
        (gray, (20, 1, 5, 5), F16, 1, 1),
        ((F16, (8, 4, 96, 96)), (32, 4, 3, 3), F16, 1, 1),
        ((F32, (8, 2, 96, 96)), (64, 2, 3, 3), F16, 1, 1),
    ]
    for image, filters, dtype, stride, dilation in chosen:
        store = ex.cast(relu6(add(ACC, arg(2, dtype))), dtype)
        op = conv_op(filters[-1], stride, 1, store, dilation)
        step = make_step(op, [image, weight(*filters, dtype=dtype), weight(filters[0], 1, 1, dtype=dtype)])
        geometry = Geometry(step)
        assert is_stem(step, geometry, context), filters
        pairs = pairs_of(geometry)
        assert pairs is not None
        tiles = conv_stem.candidates(geometry, pairs, context.architecture)
        for tile in (tiles[0], tiles[-1]):
            yield f"stem {filters} {tile}", launch_stem(step, geometry, context, tile)
    for image, dtype in ((photo, F16), (inner, F16), (photo, bf16), (photo, F32)):
        op = Conv((16, 16), ((0, 0), (0, 0)), (1, 1), stores=(ex.cast(add(ACC, arg(2, dtype)), dtype),))
        step = make_step(op, [image, weight(768, 3, 16, 16, dtype=dtype), weight(768, 1, 1, dtype=dtype)])
        for launch in family_of(op).lower(step, context):
            yield "patches", launch


def depthwise_products(context: Context) -> Iterator[tuple[str, Launch]]:
    """Depthwise filters of every size, stride and dilation, in small tiles and large ones."""
    shapes = ((1, 144, 56), (64, 96, 112), (64, 672, 14), (64, 1152, 7))  # batch, channels, size
    usual = product(((3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1)), shapes)  # kernel, stride, dilation
    rare = ((1, 1, 1), (2, 2, 1), (4, 3, 1), (6, 1, 1), (7, 1, 1), (7, 2, 1), (3, 1, 2), (5, 1, 4), (7, 2, 2))
    chosen = (*usual, *((each, shapes[0]) for each in rare))
    for turn, ((kernel, stride, dilation), (batch, channels, size)) in enumerate(chosen):
        dtype = DType.BF16 if turn % 3 == 0 else F16
        store = ex.cast(relu6(add(ACC, arg(2, dtype))), dtype)
        shape = (batch, channels, size, size)
        inner = replace(channels_inner(*shape), dtype=dtype)
        op = conv_op(kernel, stride, channels, store, dilation)
        filters = weight(channels, 1, kernel, kernel, dtype=dtype)
        step = make_step(op, [inner, filters, weight(channels, 1, 1, dtype=dtype)])
        geometry = Geometry(step)
        if is_depthwise_product(step, geometry, context):
            name = f"depthwise {kernel}/{stride} dilation {dilation} {channels}@{size}"
            yield name, launch_depthwise_product(step, geometry, context)


def _conv(
    dtype: DType,
    channels: int = 0,
    groups: int = 1,
    kernel: int = 3,
    axes: int = 2,
    transposed: bool = False,
    known: bool = True,
    residual: bool = False,
    image: DType | None = None,
) -> Step:
    """A convolution to as many channels as there are groups, or 128, with stride 2 where it is transposed."""
    wide = ex.Acc(dtype) if dtype is DType.F64 else ACC
    n = groups if groups > 100 else 128
    c = channels or (n if groups > 1 else 64)
    store = ex.cast(relu6(ex.cast(add(wide, arg(2, dtype)) if dtype is not DType.F64 else wide, F32)), dtype)
    store = stored(add(add(ACC, arg(2, dtype)), arg(3, dtype)), dtype) if residual else store
    strides, pad = (2 if transposed else 1,) * axes, kernel // 2
    op = Conv(strides, ((pad, pad),) * axes, (1,) * axes, groups, transposed, stores=(store,))
    filters = (c, n // groups, *(kernel,) * axes) if transposed else (n, c // groups, *(kernel,) * axes)
    inputs: list[Given] = [(image or dtype, (2, c, *(12,) * axes))]
    inputs += [weight(*filters, dtype=dtype) if known else (dtype, filters), weight(n, *(1,) * axes, dtype=dtype)]
    inputs += [(dtype, (2, n, *(23 if transposed else 12,) * axes))] if residual else []
    return make_step(op, inputs)


def products(context: Context) -> Iterator[tuple[str, Launch]]:
    """Products in every tile, whole and split, and in slices, with every kind of operands."""
    fp16, architecture = _product(F16), context.architecture
    residual = make_step(Gemm((BIAS_RESIDUAL,)), [*fp16.inputs, (F16, (300, 400))])
    portable = [tile for tile in MMA_TILES if tile.shared_bytes <= architecture.shared_bytes]
    wgmma = WGMMA_TILES if architecture.wgmma else ()
    divisible: list[Tile] = [*portable, *(tile for tile in wgmma if tile.most_splits > 1)]
    rounding = replace(context, tf32=True)
    chosen: list[tuple[Step, Context, Sequence[Tile]]] = [
        (fp16, context, (*portable, *wgmma)),
        (residual, context, [replace(tile, splits=3) for tile in divisible]),
        (_product(DType.BF16), context, (portable[0], *wgmma[:1])),
        (_product(F32), rounding, (portable[0], portable[-1], *wgmma[:1], *wgmma[7:8])),
        (_product(F32), context, portable),
    ]
    for step, how, tiles in chosen:
        assert isinstance(step.op, Gemm)
        epilogue = epilogue_of(step, step.op.stores, (0, 1), 400)
        for tile in tiles:
            yield f"gemm {tile}", launch_product(product_of(step, how), epilogue, tile, how)
    for dtype, k in ((F16, 16), (F16, 32), (DType.BF16, 32), (F32, 8), (F32, 16)):
        step, how = _product(dtype, 5000, k, 96 + k, residual=k == 32 and dtype is F16), rounding
        assert isinstance(step.op, Gemm)
        product = product_of(step, how)
        slices = stream_tile(product, operands_of(dtype, how))
        assert slices is not None
        epilogue = epilogue_of(step, step.op.stores, (0, 1), product.n)
        yield f"gemm {slices}", launch_product(product, epilogue, slices, how)


def _product(dtype: DType, m: int = 300, k: int = 384, n: int = 400, residual: bool = False) -> Step:
    """A product with a weight, bias and GELU, or a residual."""
    biased = add(ACC, arg(2, dtype))
    store = stored(add(biased, arg(3, dtype)) if residual else gelu(biased), dtype)
    inputs: list[Given] = [(dtype, (m, k)), weight(k, n, dtype=dtype), weight(n, dtype=dtype)]
    return make_step(Gemm((store,)), [*inputs, *([(dtype, (m, n))] if residual else [])])
