"""The covering set's steps of the light families: norms, reductions, pools, element-wise work, copies."""

from __future__ import annotations

from collections.abc import Iterator

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
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
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.covering.build import (
    F16,
    F32,
    I64,
    SCALE_SHIFT,
    arg,
    make_step,
    stored,
    weight,
)

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
