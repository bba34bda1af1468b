"""Point-wise chains against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pointwise
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import F16, F32, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_pointwise_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pointwise"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 40, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        other = tuple(size if rng.random() < 0.6 else 1 for size in shape)[int(rng.integers(0, rank)) :]
        value = cv.add(cv.mul(cv.arg(0), cv.arg(1, F32)), cv.constant(0.5))
        stores = (cv.stored(cv.gelu(value)), value) if i % 4 == 0 else (cv.stored(cv.relu6(value)),)
        given: cv.Given = fed(F16, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (F16, shape)
        cases.append(Case(f"{shape} {other}", make_step(Pointwise(stores), [given, (F32, other)]), 1))
    check(runner, cases)


FLOAT_OPS = [
    PointOp.SUB, PointOp.DIV, PointOp.MIN, PointOp.MAX, PointOp.MOD, PointOp.FMOD, PointOp.NEG, PointOp.ABS,
    PointOp.SIGN, PointOp.FLOOR, PointOp.CEIL, PointOp.ROUND, PointOp.EXP, PointOp.SIN, PointOp.COS,
    PointOp.TAN, PointOp.ATAN,
    PointOp.SINH, PointOp.COSH, PointOp.ASINH, PointOp.TANH, PointOp.ERF, PointOp.SIGMOID, PointOp.SQRT, PointOp.LOG,
]  # fmt: skip
INTEGER_OPS = [
    PointOp.ADD,
    PointOp.SUB,
    PointOp.MUL,
    PointOp.DIV,
    PointOp.MOD,
    PointOp.FMOD,
    PointOp.BITAND,
    PointOp.EQ,
]
BINARY = {
    PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.MIN, PointOp.MAX, PointOp.MOD, PointOp.FMOD,
    PointOp.BITAND, PointOp.EQ,
}  # fmt: skip


def test_every_operation_matches_numpy(runner: Runner, count: int) -> None:
    cases, rng = [], rng_of("ops")
    for op in FLOAT_OPS:
        args = (ex.Arg(0, F32), ex.Arg(1, F32))[: 2 if op in BINARY else 1]
        step = make_step(Pointwise((ex.apply(op, *args),)), [(F32, (200,)), (F32, (200,))][: len(args)])
        cases.append(Case(op.value, step, 1))
    for op in INTEGER_OPS:
        for dtype in (I64, DType.I32, DType.U8, DType.I8):
            step = make_step(
                Pointwise((ex.apply(op, ex.Arg(0, dtype), ex.Arg(1, dtype)),)), [(dtype, (200,)), (dtype, (200,))]
            )
            feeds = {i: rng.integers(1, 100, 200).astype(dtype.numpy) for i in range(2)}
            cases.append(Case(f"{op.value} {dtype}", step, 1, feeds))
    for source in (F16, F32, I64, DType.I32, DType.U8, DType.BOOL, DType.BF16):
        for to in (F16, F32, I64, DType.I32, DType.U8, DType.BOOL, DType.BF16):
            step = make_step(Pointwise((ex.cast(ex.Arg(0, source), to),)), [(source, (100,))])
            feeds = {0: rng.integers(0, 100, 100).astype(source.numpy)}
            cases.append(Case(f"{source} to {to}", step, 1, feeds))
    check(runner, cases)
