"""Work on the GPU as contenders: CUDA graphs of many runs on rotating operands, and plain calls. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from benchmarks.gpu.pace import COOL, Pace
from benchmarks.measure import worst

Check = Callable[[int, torch.Tensor], float]
"""The relative error of a result on operand set number so-and-so."""


class CallContender:
    """A function that queues one run on the current stream and returns its result."""

    runs = 1
    """Runs in one call of `_queue`."""

    def __init__(self, call: Callable[[], torch.Tensor], check: Check, pace: Pace = COOL) -> None:
        self._call = call
        self._check = check
        self._pace = pace
        self._repeats = self._before = 0

    def error(self) -> float:
        """The relative error of a fresh run."""
        result = self._call()
        torch.cuda.synchronize()
        return self._check(0, result)

    def round_us(self) -> float:
        """Microseconds per run in a round, behind as much of the same as the pace asks for: what others did before is
        not to count."""
        if not self._repeats:
            self._elapsed_ms(1)
            once = max(self._elapsed_ms(1), 1e-3)
            self._repeats, self._before = max(1, int(self._pace.round_ms / once)), ceil(self._pace.warm_ms / once)
        return self._elapsed_ms(self._repeats, self._before) * 1e3 / self._repeats / self.runs

    def _queue(self) -> Any:
        return self._call()

    def _elapsed_ms(self, repeats: int, before: int = 0) -> float:
        """Of so many calls, behind others that do not count."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(before):
            self._queue()
        begin.record()
        for _ in range(repeats):
            self._queue()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


class GraphContender(CallContender):
    """`work(i)` on each of `runs` operand sets, captured one after the other in a CUDA graph.

    All results stay alive while the graph is captured, so that each has memory of its own.
    """

    def __init__(self, work: Callable[[int], torch.Tensor], runs: int, check: Check, pace: Pace = COOL) -> None:
        super().__init__(lambda: work(0), check, pace)
        self.runs = runs
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose algorithms and take workspaces outside the capture
            for _ in range(2):
                work(0)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [work(i) for i in range(runs)]

    def error(self) -> float:
        """The larger error of the first and the last set, after a replay over poisoned results."""
        ends = {0, self.runs - 1}
        for i in ends:
            self._results[i].fill_(float("nan"))
        self._graph.replay()
        torch.cuda.synchronize()
        return worst(self._check(i, self._results[i]) for i in ends)

    def _queue(self) -> None:
        self._graph.replay()


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result − reference‖₂ / ‖reference‖₂; infinite where the shapes differ."""
    if result.shape != reference.shape:
        return float("inf")
    wide = reference.double()
    return float((result.double() - wide).norm() / wide.norm())


def full_precision() -> None:
    """fp32 products and convolutions of PyTorch in fp32 proper, not TF32: they are references here."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def measured_ceilings() -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this device now, the best of seven rounds: cuBLAS at 8192³ in fp16; a copy or a sum of
    1 GiB, whichever moves more, since memory is faster at reading alone."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    product = GraphContender(lambda _: torch.mm(a, b), 1, lambda i, result: 0.0)
    copy = GraphContender(lambda _: target.copy_(source), 1, lambda i, result: 0.0)
    read = GraphContender(lambda _: source.sum(), 1, lambda i, result: 0.0)
    rounds = [(product.round_us(), copy.round_us(), read.round_us()) for _ in range(7)]
    product_us, copy_us, read_us = (min(times) for times in zip(*rounds, strict=True))
    return 2 * n**3 / product_us * 1e6, max(2 * source.nbytes / copy_us, source.nbytes / read_us) * 1e6
