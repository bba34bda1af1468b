"""``python -m benchmarks.cuda_kernels``: our CUDA kernels beside cuBLAS, cuDNN and SDPA (through PyTorch), in one run.

Checks before it times: a row counts only where our result is within 1e-2 of the peer computed in fp32. Prints a table
and writes ``benchmarks/results/cuda-<device>.json``. The peer is what PyTorch eager runs for the same mathematics on
the same operands (NHWC images, fp16 masks), captured in a CUDA graph as ours is. `floor_us` is the larger of FLOPs over
this run's best product rate and bytes over its copy rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.cuda_timing import Prepared, captured, interleaved_us
from engine.errors import EngineError
from engine.ir.ops import Attention, Gemm, Norm, NormKind, Reduce, ReduceKind
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import F16, make_step, weight
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Launch
from engine.targets.cuda.target import CudaTarget

TOLERANCE = 1e-2
Peer = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A step and what PyTorch calls the same. `rotate`: operands come from memory, not from the L2 cache."""

    suite: str
    name: str
    step: Step
    peer: Peer
    rotate: bool = True


@dataclass(frozen=True)
class Row:
    """One measured case; times in microseconds, `ratio` = peer / ours (above 1: ours is faster)."""

    suite: str
    case: str
    ours_us: float
    peer_us: float
    ratio: float
    floor_us: float
    rel_err: float
    kernel: str
    commit: str
    date: str


def gemm_cases() -> Iterator[Case]:
    plain = Gemm((cv.stored(cv.ACC),))
    for m, n, k in (
        (4096, 4096, 4096), (8192, 8192, 8192), (4096, 2304, 768), (4096, 768, 768), (4096, 3072, 768),
        (4096, 768, 3072), (512, 2304, 768), (512, 768, 3072), (128, 768, 768), (128, 3072, 768),
        (4096, 1152, 384), (4096, 384, 384), (4096, 1536, 384), (4096, 384, 1536), (64, 1152, 384), (64, 384, 1536),
    ):  # fmt: skip
        step = make_step(plain, [(F16, (m, k)), weight(k, n)])
        yield Case("gemm", f"{m}x{n}x{k}", step, torch.matmul)
    m, n, k = 4096, 1536, 384
    step = make_step(Gemm((cv.BIAS_GELU,)), [(F16, (m, k)), weight(k, n), weight(n)])
    yield Case("gemm", f"{m}x{n}x{k} bias gelu", step, lambda a, b, c: F.gelu(torch.addmm(c, a, b)))
    step = make_step(Gemm((cv.BIAS_RESIDUAL,)), [(F16, (m, n)), weight(n, k), weight(k), (F16, (m, k))])
    yield Case("gemm", f"{m}x{k}x{n} bias residual", step, lambda a, b, c, r: torch.addmm(c, a, b) + r)


def _conv2d(stride: int, pad: int, groups: int, clamp: bool = True) -> Peer:
    def run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        channels_last = w.to(memory_format=torch.channels_last) if groups == 1 else w
        y = F.conv2d(x.to(w.dtype), channels_last, bias.reshape(-1), stride, pad, groups=groups)
        y = y + residual[0] if residual else y
        return F.relu6(y) if clamp else y

    return run


def conv_cases() -> Iterator[Case]:
    for batch in (1, 32, 128):
        for c, n, size, kernel, stride, groups in (
            (3, 32, 224, 3, 2, 1), (16, 96, 112, 1, 1, 1), (96, 24, 56, 1, 1, 1), (240, 40, 28, 1, 1, 1),
            (672, 112, 14, 1, 1, 1), (1152, 320, 7, 1, 1, 1), (96, 96, 112, 3, 2, 96), (144, 144, 56, 3, 1, 144),
            (240, 240, 28, 5, 1, 240), (672, 672, 14, 5, 1, 672), (1152, 1152, 7, 5, 1, 1152), (64, 64, 56, 3, 1, 1),
            (256, 256, 14, 3, 1, 1),
        ):  # fmt: skip
            op = cv.conv_op(kernel, stride, groups)
            image = (cv.F32 if c == 3 else F16, (batch, c, size, size))
            step = make_step(op, [image, weight(n, c // groups, kernel, kernel), weight(n, 1, 1)])
            name = f"b{batch} {c}->{n}@{size} {kernel}x{kernel}/{stride}{' depthwise' if groups > 1 else ''}"
            yield Case("conv", name, step, _conv2d(stride, kernel // 2, groups))


def attention_cases() -> Iterator[Case]:
    for batch, sequence, heads, head in (
        (1, 128, 12, 32),
        (32, 128, 12, 32),
        (32, 256, 12, 32),
        (32, 128, 12, 64),
        (8, 512, 12, 64),
    ):
        shape = (batch, heads, sequence, head)
        inputs: list[cv.Given] = [(F16, shape), (F16, shape), (F16, shape), (F16, (batch, 1, 1, sequence))]
        op = Attention(head**-0.5, has_bias=True, stores=(cv.stored(cv.ACC),))
        yield Case(
            "attention", f"b{batch} s{sequence} h{heads} d{head} masked", make_step(op, inputs),
            lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias.expand(-1, -1, q.shape[2], -1)),
        )  # fmt: skip


def light_cases() -> Iterator[Case]:
    for rows, features in ((4096, 384), (4096, 768), (16384, 1024)):
        source = cv.add(cv.arg(0), cv.arg(3))
        op = Norm(NormKind.LAYER, (1,), 1e-12, source, stores=(cv.SCALE_SHIFT,))
        step = make_step(op, [(F16, (rows, features)), weight(features), weight(features), (F16, (rows, features))])
        yield Case(
            "norm", f"{rows}x{features} residual", step,
            lambda x, scale, shift, r: F.layer_norm(x + r, x.shape[-1:], scale, shift, 1e-12),
        )  # fmt: skip
    op_mean = Reduce(ReduceKind.MEAN, (2, 3), False, cv.arg(0), (cv.stored(cv.ACC),))
    for batch in (1, 128):
        step = make_step(op_mean, [_image(batch, 1280, 7)])
        yield Case("reduce", f"b{batch} 1280@7 mean", step, lambda x: x.mean((2, 3)))


def _image(batch: int, channels: int, size: int):  # type: ignore[no-untyped-def]
    from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major

    shape = (batch, channels, size, size)
    buffer = Buffer("input0", BufferKind.INPUT, 2 * batch * channels * size * size)
    return Tensor(buffer, F16, shape, row_major(shape, (0, 2, 3, 1)))


SUITES = {"gemm": gemm_cases, "conv": conv_cases, "attention": attention_cases, "light": light_cases}


def measure(target: CudaTarget, case: Case, ceilings: tuple[float, float], commit: str) -> Row:
    """Check and time one case. Raises RuntimeError where the results disagree."""
    launches: list[Launch] = family_of(case.step.op).lower(case.step, target.context)
    prepared = Prepared(target, case.step, launches, case.rotate)
    error = prepared.error(case.peer)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{case.suite} {case.name}: relative error {error:.1e}; not timed")
    count = len(prepared.sets)
    times = interleaved_us({"ours": (prepared.graph(), count), "peer": (prepared.peer_graph(case.peer), count)})
    floor = max(case.step.cost.flops / ceilings[0], case.step.cost.bytes / ceilings[1]) * 1e6
    return Row(
        case.suite, case.name, round(times["ours"], 2), round(times["peer"], 2),
        round(times["peer"] / times["ours"], 3),
        round(floor, 2), float(f"{error:.1e}"), launches[0].kernel.source.name, commit, date.today().isoformat(),
    )  # fmt: skip


def _discard(value: object) -> None:
    del value


def ceilings_of_this_run() -> tuple[float, float]:
    """(FLOP/s, bytes/s): the best of cuBLAS at 8192³ in fp16 and a copy of 1 GiB, measured now."""
    a = torch.randn(8192, 8192, device="cuda").half()
    b = torch.randn(8192, 8192, device="cuda").half()
    source = torch.randn(1 << 28, device="cuda").half()
    result = torch.empty_like(source)
    product = captured(lambda: _discard(torch.matmul(a, b)))
    moved = captured(lambda: _discard(torch.neg(source, out=result)))  # a copy by the multiprocessors, as kernels do it
    times = interleaved_us({"product": (product, 1), "copy": (moved, 1)})
    return 2 * 8192**3 / times["product"] * 1e6, 2 * source.nbytes / times["copy"] * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_kernels", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(SUITES))
    parser.add_argument("--commit", default="")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    target = CudaTarget(0)
    ceilings = ceilings_of_this_run()
    print(f"{target.device.name}: {ceilings[0] / 1e12:.0f} TFLOP/s, {ceilings[1] / 1e12:.2f} TB/s")
    rows, failed = [], 0
    for suite in options.suites:
        cases = list(SUITES[suite]())
        for case in cases:
            try:
                row = measure(target, case, ceilings, commit)
            except (RuntimeError, EngineError) as error:
                print(f"FAILED {error}")
                failed += 1
                continue
            rows.append(row)
            tflops = case.step.cost.flops / row.ours_us * 1e-6
            tbytes = case.step.cost.bytes / row.ours_us * 1e-6
            print(
                f"{row.suite:9} {row.case:34} ours {row.ours_us:9.2f} us  peer {row.peer_us:9.2f}  x{row.ratio:5.2f}  "
                f"floor {row.floor_us:8.2f}  {tflops:6.1f} TFLOP/s {tbytes:5.2f} TB/s  err {row.rel_err:.0e}",
                flush=True,
            )
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"cuda-{target.device.name.lower().replace(' ', '-')}.json"
    record = {"device": target.device.name, "torch": torch.__version__, "flops": ceilings[0], "bytes": ceilings[1]}
    file.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
