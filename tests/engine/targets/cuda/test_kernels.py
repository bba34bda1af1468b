"""Every kernel family against float64, on random ragged shapes: on a GPU, and on a CPU under the emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Attention,
    Conv,
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
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.conv import (
    Geometry,
    channels_last,
    launch_conv,
    launch_depthwise,
    pack_depthwise,
    pack_filter,
)
from engine.targets.cuda.covering import ACC, F16, F32, I64, make_step, weight
from engine.targets.cuda.gemm import epilogue_of, launch_product, product_of
from engine.targets.cuda.kernel import Pointer
from engine.targets.cuda.tiles import MMA_TILES, WGMMA_TILES
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner, run_cases

CASES = int(os.environ.get("TILEWAVE_KERNEL_CASES", "300"))
EMULATED_CASES = 12  # a kernel takes a second to compile for the CPU


@pytest.fixture(
    scope="module",
    params=["emulated sm_80", "emulated sm_90a", pytest.param("gpu", marks=pytest.mark.gpu)],
)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "gpu":
        from tests.engine.targets.cuda.gpu_runner import GpuRunner

        made = GpuRunner()
        yield made
        made.close()
    elif emulator.compiler() is None:
        pytest.skip("no g++ for x86-64 here")
    else:
        yield EmulatedRunner(ARCHITECTURES[request.param.split()[1]])


@pytest.fixture(scope="module")
def count(runner: Runner) -> int:
    """Random cases of one family."""
    return EMULATED_CASES if isinstance(runner, EmulatedRunner) else CASES


def check(runner: Runner, cases: list[Case]) -> None:
    failures = run_cases(runner, cases)
    assert not failures, f"{len(failures)} of {len(cases)} failed\n" + "\n".join(failures[:12])


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in name])


def ragged(rng: np.random.Generator, most: int, multiple: int = 1) -> int:
    """A size, small ones as likely as large ones."""
    return max(multiple, int(2 ** rng.uniform(0, np.log2(most))) // multiple * multiple)


def test_covering_set(runner: Runner, count: int) -> None:
    check(runner, [Case(step.name, step, 2000) for step in cv.steps()])


GEMM_STORES = {"bias": cv.BIAS, "bias gelu": cv.BIAS_GELU, "residual": cv.BIAS_RESIDUAL, "plain": ACC}


def test_gemm_with_weight_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("gemm"), []
    tiles = [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]
    for i in range(count):
        tile = tiles[i % len(tiles)]
        aligned = tile in WGMMA_TILES or rng.random() < 0.6
        m, k, n = (
            ragged(rng, 700),
            ragged(rng, 900, 8 if aligned else 1),
            ragged(rng, 500, 8 if rng.random() < 0.6 else 1),
        )
        name = list(GEMM_STORES)[i % 4]
        inputs: list[cv.Given] = [(F16, (m, k)), weight(k, n)]
        inputs += [] if name == "plain" else [weight(n)]
        inputs += [(F16, (m, n))] if name == "residual" else []
        step = make_step(Gemm((GEMM_STORES[name],)), inputs)
        launch = launch_product(
            product_of(step, runner.context), epilogue_of(step, (GEMM_STORES[name],), (0, 1), n), tile, runner.context
        )
        cases.append(Case(f"{m}x{n}x{k} {name}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_more_tiles_than_multiprocessors(runner: Runner, count: int) -> None:
    """A persistent block takes several tiles: its rings and turns wrap around."""
    cases = []
    large, small = ((3000, 1512, 200), (5000, 1000, 1096), (20000, 200, 40)), ((420, 264, 200), (900, 40, 40))
    for m, n, k in small if isinstance(runner, EmulatedRunner) else large:
        step = make_step(Gemm((cv.BIAS_RESIDUAL,)), [(F16, (m, k)), weight(k, n), weight(n), (F16, (m, n))])
        product, epilogue = product_of(step, runner.context), epilogue_of(step, (cv.BIAS_RESIDUAL,), (0, 1), n)
        for tile in [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]:
            launch = launch_product(product, epilogue, tile, runner.context)
            cases.append(Case(f"{m}x{n}x{k} {tile}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_activations_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("batch"), []
    for i in range(count):
        m, k, n = (ragged(rng, 200, 8 if rng.random() < 0.5 else 1) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 3))))
        b_lead = lead if i % 3 else lead[1:]
        b = _fed(F16, (*b_lead, k, n), inner=-2 if i % 2 else -1)
        step = make_step(Gemm((cv.stored(ACC),)), [(F16, (*lead, m, k)), b])
        cases.append(Case(f"{lead}{m}x{n}x{k} b{b_lead}", step, k))
    check(runner, cases)


def _fed(dtype: DType, shape: tuple[int, ...], inner: int, number: int = 1) -> Tensor:
    """An operand with axis `inner` innermost."""
    axes = list(range(len(shape)))
    axes.append(axes.pop(inner))
    buffer = Buffer(f"input{number}", BufferKind.INPUT, int(np.prod(shape)) * dtype.itemsize)
    return Tensor(buffer, dtype, shape, row_major(shape, tuple(axes)))


def test_convolution_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("conv"), []
    for i in range(count):
        groups = int(rng.choice([1, 1, 1, 2, 3]))
        c = groups * ragged(rng, 72, 8 if rng.random() < 0.6 else 1)
        n = groups * ragged(rng, 96, 8 if rng.random() < 0.6 else 1)
        kernel = tuple(int(rng.integers(1, 5)) for _ in range(2))
        strides = tuple(int(rng.integers(1, 3)) for _ in range(2))
        dilations = tuple(int(rng.integers(1, 3)) for _ in range(2))
        pads = tuple((int(rng.integers(0, 3)), int(rng.integers(0, 3))) for _ in range(2))
        size = tuple((k - 1) * d + 1 + int(rng.integers(0, 20)) for k, d in zip(kernel, dilations, strict=True))
        x = (F32 if c < 8 and i % 2 else F16, (int(rng.integers(1, 4)), c, *size))
        # The kernel rounds an fp32 image to fp16: give it one that survives this.
        feeds = {0: rng.standard_normal(x[1]).astype(np.float16).astype(np.float32)} if x[0] is F32 else {}
        store = cv.BIAS_RELU6 if i % 2 else cv.BIAS
        op = Conv(strides, pads, dilations, groups, stores=(store,))
        step = make_step(op, [x, weight(n, c // groups, *kernel), weight(n, 1, 1)])
        tile = MMA_TILES[i % len(MMA_TILES)]
        packed = Pointer(runner.context.weights.packed(step.inputs[1], "n,rsc8", pack_filter))
        epilogue = epilogue_of(step, (store,), channels_last(4), n // groups)
        launch = launch_conv(Geometry(step), epilogue, packed, tile)
        cases.append(
            Case(f"{x} * {n} {kernel} {op.strides} {pads} {dilations} g{groups}", step, c * 16, feeds, [launch])
        )
    check(runner, cases)


def test_chosen_convolutions_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("chosen"), []
    for i in range(count):
        c, n = ragged(rng, 200, 8), ragged(rng, 200, 8)
        image = (F16, (int(rng.integers(1, 4)), c, int(rng.integers(3, 30)), int(rng.integers(3, 30))))
        size = int(rng.choice([1, 1, 3]))
        store = cv.BIAS_RESIDUAL if i % 3 == 0 else cv.BIAS_RELU6
        inputs: list[cv.Given] = [image, weight(n, c, size, size), weight(n, 1, 1)]
        inputs += [(F16, (image[1][0], n, *image[1][2:]))] if i % 3 == 0 else []
        cases.append(Case(f"{image} * {n} {size}", make_step(cv.conv_op(size, store=store), inputs), c * size * size))
    check(runner, cases)


def test_depthwise_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("depthwise"), []
    for _ in range(count):
        c = ragged(rng, 200, 8)
        kernel, stride, dilation = int(rng.choice([3, 5])), int(rng.integers(1, 3)), int(rng.choice([1, 1, 2]))
        pads = tuple((int(rng.integers(0, 4)), int(rng.integers(0, 4))) for _ in range(2))
        size = tuple((kernel - 1) * dilation + 1 + int(rng.integers(0, 24)) for _ in range(2))
        op = Conv((stride, stride), pads, (dilation, dilation), c, stores=(cv.BIAS_RELU6,))
        image = (F16, (int(rng.integers(1, 4)), c, *size))
        step = make_step(op, [image, weight(c, 1, kernel, kernel), weight(c, 1, 1)])
        taps = runner.context.weights.packed(step.inputs[1], "f32 r,s,c", pack_depthwise)
        epilogue = epilogue_of(step, op.stores, channels_last(4), 8)
        # The patch grows as there are fewer multiprocessors to fill.
        launch = launch_depthwise(Geometry(step), epilogue, taps, int(rng.choice([0, 2, 132])))
        cases.append(Case(f"{image} {kernel} {stride} {dilation} {pads}", step, 25, lowered=[launch]))
    check(runner, cases)


def test_attention_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("attention"), []
    for i in range(count):
        head, value = int(rng.choice([8, 16, 32, 40, 64, 96, 128])), int(rng.choice([16, 32, 64, 128]))
        batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        heads = kv_heads * int(rng.choice([1, 1, 2]))
        queries, keys = ragged(rng, 300), ragged(rng, 300)
        bias = [None, (batch, 1, 1, keys), (1, heads, queries, keys), (queries, keys)][i % 4]
        op = Attention(head**-0.5, bool(rng.random() < 0.3), bias is not None, stores=(cv.stored(ACC),))
        inputs: list[cv.Given] = [
            (F16, (batch, heads, queries, head)), (F16, (batch, kv_heads, keys, head)),
            (F16, (batch, kv_heads, keys, value)),
        ]  # fmt: skip
        feeds: dict[int, np.ndarray] = {}
        if bias is not None:
            dtype = F32 if i % 8 < 4 else F16
            inputs.append((dtype, bias))
            lowest = -np.inf if rng.random() < 0.3 else float(np.finfo(dtype.numpy).min)
            masked = np.where(rng.random(bias) < 0.3, lowest, rng.standard_normal(bias))
            masked[..., 0] = 0.0  # no row is empty: a separate test has those
            feeds[3] = masked.astype(dtype.numpy)
        cases.append(Case(f"{inputs} causal={op.causal}", make_step(op, inputs), keys, feeds))
    check(runner, cases)


def test_attention_rows_without_keys(runner: Runner, count: int) -> None:
    heads: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 70, 32))
    cases = []
    for zero in (False, True):
        op = Attention(0.2, False, True, zero, (cv.stored(ACC),))
        for lowest in (-np.inf, float(np.finfo(np.float32).min)):
            bias = np.zeros((2, 1, 1, 70), np.float32)
            bias[1] = lowest
            cases.append(
                Case(f"{zero} {lowest}", make_step(op, [heads, heads, heads, (F32, bias.shape)]), 70, {3: bias})
            )
    check(runner, cases)


def test_attention_reads_a_fused_projection_in_place(runner: Runner, count: int) -> None:
    batch, sequence, heads, head = 3, 45, 4, 32
    step = fused_attention(batch, sequence, heads, head)
    check(runner, [Case("fused", step, sequence)])


def fused_attention(batch: int, sequence: int, heads: int, head: int):
    """Attention on slices of [batch, sequence, 3, heads, head], writing [batch, sequence, heads, head]."""
    features = heads * head
    buffers = [Buffer(f"input{i}", BufferKind.INPUT, 2 * batch * sequence * 3 * features) for i in range(3)]
    shape, strides = (batch, heads, sequence, head), (sequence * 3 * features, head, 3 * features, 1)
    tensors = [Tensor(buffer, F16, shape, strides, i * features) for i, buffer in enumerate(buffers)]
    step = make_step(Attention(head**-0.5, stores=(cv.stored(ACC),)), tensors)
    out = Buffer("output0", BufferKind.OUTPUT, 2 * batch * sequence * features)
    result = Tensor(out, F16, shape, (sequence * features, head, features, 1))
    return type(step)(step.name, step.op, step.inputs, (result,), step.cost)


def test_norms_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("norm"), []
    for i in range(count):
        rows, columns = ragged(rng, 200), ragged(rng, 5000, 8 if rng.random() < 0.6 else 1)
        kind = list(NormKind)[i % 3]
        residual = i % 2 == 0
        source = cv.add(cv.arg(0), cv.arg(3)) if residual else cv.arg(0)
        inputs: list[cv.Given] = [(F16, (rows, columns)), weight(columns), weight(columns)]
        inputs += [(F16, (rows, columns))] if residual else []
        stores = (cv.SCALE_SHIFT, source) if i % 5 == 0 else (cv.SCALE_SHIFT,)
        step = make_step(Norm(kind, (1,), 1e-5, source, stores=stores), inputs)
        cases.append(Case(f"{kind} {rows}x{columns}", step, columns))
    check(runner, cases)


def test_embedding_norm_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("embedding"), []
    for _ in range(40):
        batch, sequence, features = int(rng.integers(1, 5)), ragged(rng, 100), ragged(rng, 800, 8)
        step = cv.embedding_norm(batch, sequence, features)
        ids = rng.integers(-1000, 1000, (batch, sequence))
        cases.append(Case(f"{batch}x{sequence}x{features}", step, features, {3: ids}))
    check(runner, cases)


def test_softmax_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("softmax"), []
    for i in range(count):
        shape = (int(rng.integers(1, 4)), ragged(rng, 40), ragged(rng, 5000, 8 if i % 3 else 1))
        step = make_step(Softmax(2, i % 2 == 1, cv.arg(0), (ACC,)), [(F16, shape)])
        cases.append(Case(f"{shape} log={i % 2}", step, shape[2]))
    check(runner, cases)


def test_reductions_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("reduce"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 60, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5) or (rank - 1,)
        kind = list(ReduceKind)[i % 5]
        if kind is ReduceKind.PROD:
            axes = axes[:1]
        integers = i % 7 == 0 and kind is not ReduceKind.MEAN
        dtype = I64 if integers else F16
        source: ex.Expr = ex.Arg(0, I64) if integers else cv.arg(0)
        store: ex.Expr = ex.Acc(I64) if integers else ACC
        op = Reduce(kind, axes, bool(i % 2), source, (store,))
        given: cv.Given = _fed(dtype, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (dtype, shape)
        cases.append(Case(f"{kind} {shape} {axes}", make_step(op, [given]), int(np.prod(shape))))
    check(runner, cases)


def test_pools_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pool"), []
    while len(cases) < count:
        i = len(cases)
        kernel = tuple(int(rng.integers(1, 5)) for _ in range(2))
        strides = tuple(int(rng.integers(1, 4)) for _ in range(2))
        pads = tuple((int(rng.integers(0, k)), int(rng.integers(0, k))) for k in kernel)
        size = tuple(k + int(rng.integers(0, 20)) for k in kernel)
        shape = (int(rng.integers(1, 4)), ragged(rng, 70, 8 if i % 3 else 1), *size)
        op = Pool(list(PoolKind)[i % 2], kernel, strides, pads, (1, 1), i % 4 > 1, i % 3 == 0, (cv.stored(ACC),))
        if (
            op.kind is PoolKind.AVERAGE
            and not op.count_include_pad
            and any(b >= k or e >= k for (b, e), k in zip(pads, kernel, strict=True))
        ):
            continue
        cases.append(Case(f"{op} {shape}", make_step(op, [(F16, shape)]), 25))
    check(runner, cases)


def test_pointwise_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pointwise"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 40, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        other = tuple(size if rng.random() < 0.6 else 1 for size in shape)[int(rng.integers(0, rank)) :]
        value = cv.add(cv.mul(cv.arg(0), cv.arg(1, F32)), cv.constant(0.5))
        stores = (cv.stored(cv.gelu(value)), value) if i % 4 == 0 else (cv.stored(cv.relu6(value)),)
        given: cv.Given = _fed(F16, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (F16, shape)
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
