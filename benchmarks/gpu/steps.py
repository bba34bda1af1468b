"""A kernel case as a step of the engine, and the sources of the kernels that it launches. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod

import numpy as np

from benchmarks.cases import KernelCase
from benchmarks.cases.attention import AttentionCase, DecodeCase, Mask, VarlenCase, WindowCase
from benchmarks.cases.block import BlockCase
from benchmarks.cases.conv import ConvCase, Tail
from benchmarks.cases.gemm import Epilogue, Fp8Case, GemmCase, MatricesCase
from benchmarks.cases.light import Kind, LightCase
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Attention,
    Conv,
    ConvMax,
    Gemm,
    Norm,
    NormKind,
    Pointwise,
    Pool,
    PoolKind,
    Reduce,
    ReduceKind,
    Softmax,
)
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.source import expand

KERNEL_CASES = (
    GemmCase, Fp8Case, MatricesCase, ConvCase, BlockCase, AttentionCase, WindowCase, VarlenCase, DecodeCase, LightCase
)  # fmt: skip
F16, F32, F8 = DType.F16, DType.F32, DType.F8E4M3

Constants = Callable[..., np.ndarray]
"""Makes the content of a weight of the shape given as arguments, in fp16."""


def zeros(*shape: int) -> np.ndarray:
    """Weights whose content does not matter."""
    return np.zeros(shape, np.float16)


@lru_cache(maxsize=512)
def random_weight(*shape: int) -> np.ndarray:
    """A random constant, the same whenever asked; a matrix [k, n] or a filter [n, c, …] keeps unit variance."""
    fan_in = 1 if len(shape) == 1 else shape[0] if len(shape) == 2 else prod(shape[1:])
    drawn = np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)
    drawn *= np.float32(max(1, fan_in) ** -0.5)
    return drawn.astype(np.float16)


def context(architecture: str, multiprocessors: int) -> Context:
    """What lowering has to know of a device."""
    return Context(ARCHITECTURES[architecture], multiprocessors, WeightStore())


def kernel_sources(case: KernelCase, where: Context) -> list[str]:
    """The complete sources of the kernels that a case launches. Raises EngineError where it has none."""
    step = step_of(case, zeros)
    return [expand(launch.kernel.source.text) for launch in family_of(step.op).lower(step, where)]


def step_of(case: KernelCase, weight: Constants = random_weight) -> Step:
    """The step that a case is."""
    match case:
        case GemmCase():
            return _gemm(case, weight)
        case Fp8Case():
            return _fp8(case, weight)
        case MatricesCase():
            shapes = (case.batch, case.m, case.k), (case.batch, case.k, case.n)
            return cv.make_step(Gemm((cv.stored(cv.ACC),)), [(F16, shape) for shape in shapes])
        case ConvCase():
            return _conv(case, weight)
        case BlockCase():
            return _block(case, weight)
        case AttentionCase():
            return _attention(case)
        case WindowCase():
            heads = F16, (case.batch, case.heads, case.sequence, case.head)
            op = Attention(case.head**-0.5, causal=True, stores=(cv.stored(cv.ACC),), window=case.window)
            return cv.make_step(op, [heads] * 3)
        case VarlenCase():
            return _varlen(case)
        case DecodeCase():
            q = F16, (case.batch, case.heads, case.queries, case.head)
            kv = F16, (case.batch, case.kv_heads, case.keys, case.head)
            return cv.make_step(Attention(case.head**-0.5, stores=(cv.stored(cv.ACC),)), [q, kv, kv])
        case LightCase():
            return _light(case, weight)


_GEMM_STORES = {
    Epilogue.NONE: cv.stored(cv.ACC),
    Epilogue.BIAS: cv.BIAS,
    Epilogue.BIAS_GELU: cv.BIAS_GELU,
    Epilogue.BIAS_RESIDUAL: cv.BIAS_RESIDUAL,
}


def _gemm(case: GemmCase, weight: Constants) -> Step:
    inputs: list[cv.Given] = [(F16, (case.m, case.k)), weight(case.k, case.n)]
    if case.epilogue is not Epilogue.NONE:
        inputs.append(weight(case.n))
    if case.epilogue is Epilogue.BIAS_RESIDUAL:
        inputs.append((F16, (case.m, case.n)))
    return cv.make_step(Gemm((_GEMM_STORES[case.epilogue],)), inputs)


def _fp8(case: Fp8Case, weight: Constants) -> Step:
    """Numbers of both operands are of the size of 1: those of a weight in fp16 would be among the smallest of e4m3."""
    sums = cv.mul(cv.ACC, cv.constant(case.scale))
    stores = {Epilogue.NONE: sums, Epilogue.BIAS_GELU: cv.gelu(cv.add(sums, cv.arg(2)))}
    numbers = F8.convert(weight(case.k, case.n).astype(np.float32) / np.float32(case.scale))
    inputs: list[cv.Given] = [(F8, (case.m, case.k)), numbers]
    inputs += [] if case.epilogue is Epilogue.NONE else [weight(case.n)]
    return cv.make_step(Gemm((cv.stored(stores[case.epilogue]),)), inputs)


def _relu(value: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.MAX, value, cv.constant(0.0))


def _sigmoid(value: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.SIGMOID, value)


_BIASED = cv.add(cv.ACC, cv.arg(2))
_CONV_STORES = {
    Tail.LINEAR: cv.stored(_BIASED),
    Tail.RELU: cv.stored(_relu(_BIASED)),
    Tail.RELU6: cv.BIAS_RELU6,
    Tail.SILU: cv.stored(cv.mul(_BIASED, _sigmoid(_BIASED))),
    Tail.SIGMOID: cv.stored(_sigmoid(_BIASED)),
    Tail.RESIDUAL: cv.stored(cv.add(_BIASED, cv.arg(3))),
    Tail.RESIDUAL_RELU: cv.stored(_relu(cv.add(_BIASED, cv.arg(3)))),
}


def _conv(case: ConvCase, weight: Constants) -> Step:
    shape = (case.batch, case.channels, case.size, case.size)
    filter_ = weight(case.outputs, case.channels // case.groups, case.kernel, case.kernel)
    inputs: list[cv.Given] = [(F32, shape) if case.fp32_image else _nhwc(shape), filter_, weight(case.outputs, 1, 1)]
    if case.tail.has_residual:
        inputs.append(_nhwc((case.batch, case.outputs, case.output_size, case.output_size), "residual"))
    pads = ((case.pad, case.pad),) * 2
    op = Conv((case.stride, case.stride), pads, (1, 1), case.groups, stores=(_CONV_STORES[case.tail],))
    if not case.pool:
        return cv.make_step(op, inputs)
    around = int(case.pool == 3)
    pool = Pool(PoolKind.MAX, (case.pool,) * 2, (2, 2), ((around, around),) * 2, (1, 1), stores=(ex.Acc(F16),))
    return cv.make_step(ConvMax(op, pool), inputs)


def _block(case: BlockCase, weight: Constants) -> Step:
    """The image is the residual, where there is one."""
    wide, narrow = case.expanded, case.outputs
    filters = (wide, case.channels, 1, 1), (wide, 1, case.kernel, case.kernel), (narrow, wide, 1, 1)
    image = _nhwc((case.batch, case.channels, case.size, case.size))
    constants = [weight(*shape) for shape in (*filters, *((channels, 1, 1) for channels in (wide, wide, narrow)))]
    op = cv.block_op(wide, case.kernel, case.stride, residual=case.has_residual)
    return cv.make_step(op, [image, *constants, *([image] if case.has_residual else [])])


def _nhwc(shape: tuple[int, ...], name: str = "image") -> Tensor:
    """An fp16 operand in NHWC, whatever the kernel would take."""
    buffer = Buffer(name, BufferKind.INPUT, prod(shape) * F16.itemsize)
    return Tensor(buffer, F16, shape, row_major(shape, channels_last(len(shape))))


def _attention(case: AttentionCase) -> Step:
    heads = (F16, (case.batch, case.heads, case.sequence, case.head))
    inputs: list[cv.Given] = [heads, heads, heads]
    if case.mask.is_tensor:
        inputs.append((F16, (case.batch, 1, 1, case.sequence)))
    op = Attention(
        case.head**-0.5,
        causal=case.mask is Mask.CAUSAL,
        has_bias=case.mask.is_tensor,
        masked_rows_zero=case.mask is Mask.EMPTY,
        stores=(cv.stored(cv.ACC),),
    )
    return cv.make_step(op, inputs)


def _varlen(case: VarlenCase) -> Step:
    """The result lies as the next product reads it, [tokens, heads, head]. The starts of sequences are an input, as in
    a packed plan."""
    tokens, row = int(case.lengths.sum()), case.heads * case.head
    projected = Buffer("projected", BufferKind.INPUT, 3 * tokens * row * F16.itemsize)
    shape, strides = (1, case.heads, tokens, case.head), (3 * tokens * row, case.head, 3 * row, 1)
    parts = [Tensor(projected, F16, shape, strides, part * row) for part in range(3)]
    op = Attention(case.head**-0.5, case.causal, stores=(cv.stored(cv.ACC),), packed=True)
    step = cv.results_in(cv.make_step(op, [*parts, (DType.I32, (case.batch + 1,))]), (0, 2, 1, 3))
    # The operator does not know the lengths, and counts them as equal.
    scores = case.heads * sum(n * (n + 1) // 2 if case.causal else n * n for n in map(int, case.lengths))
    return replace(step, cost=replace(step.cost, flops=scores * (4 * case.head + 5)))


def _light(case: LightCase, weight: Constants) -> Step:
    columns, given = case.shape[-1], (F16, case.shape)
    store = (cv.stored(cv.ACC),)
    match case.kind:
        case Kind.LAYER_NORM_RESIDUAL:
            source = cv.add(cv.arg(0), cv.arg(3))
            norm = Norm(NormKind.LAYER, (1,), 1e-12, source, stores=(cv.SCALE_SHIFT,))
            return cv.make_step(norm, [given, weight(columns), weight(columns), given])
        case Kind.RMS_NORM:
            scaled = cv.stored(cv.mul(cv.ACC, cv.arg(1)))
            return cv.make_step(Norm(NormKind.RMS, (1,), 1e-6, cv.arg(0), stores=(scaled,)), [given, weight(columns)])
        case Kind.SOFTMAX:
            return cv.make_step(Softmax(1, source=cv.arg(0), stores=store), [given])
        case Kind.BIAS_GELU:
            chain = cv.stored(cv.gelu(cv.add(cv.arg(0), cv.arg(1))))
            return cv.make_step(Pointwise((chain,)), [given, weight(columns)])
        case Kind.GLOBAL_MEAN:
            return cv.make_step(Reduce(ReduceKind.MEAN, (2, 3), False, cv.arg(0), store), [_nhwc(case.shape)])
        case Kind.MAX_POOL:
            pool = Pool(PoolKind.MAX, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), stores=store)
            return cv.make_step(pool, [_nhwc(case.shape)])
