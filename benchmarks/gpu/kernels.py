"""``python -m benchmarks kernels``: single kernels on the GPU beside PyTorch and the vendor's libraries."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases import KernelCase
from benchmarks.cases.attention import AttentionCase, Mask
from benchmarks.gpu import peers
from benchmarks.gpu.operands import Fill, Operands, our_contender
from benchmarks.gpu.remote import Remote
from benchmarks.gpu.steps import step_of
from benchmarks.gpu.timing import GraphContender, full_precision
from benchmarks.measure import Contender, Entry, Measurement, measure, reason
from benchmarks.results import Ceilings
from engine.errors import EngineError
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Launch
from engine.targets.cuda.target import CudaTarget

TOLERANCE = 1e-2
COMPILE = "compile"


def measure_all(
    target: CudaTarget, cases: Sequence[KernelCase], ceilings: Ceilings, compile_seconds: float
) -> Iterator[tuple[KernelCase, Measurement, float]]:
    """(case, what came out, floor in µs), one after the other. The kernels of all cases are compiled first, in
    parallel. `compile_seconds` is how long torch.compile may take for a case; 0: it takes no part."""
    full_precision()
    torch.backends.cudnn.benchmark = True
    lowered = {case.name: _lowered(target, case) for case in cases}
    every = [launch.kernel for launches in lowered.values() if isinstance(launches, list) for launch in launches]
    try:
        target.device.load(every)
    except EngineError as error:
        print(f"not every kernel compiles; each case will say so: {reason(error)}")
    for case in cases:
        with torch.inference_mode():
            measurement, floor = _measure(target, case, lowered[case.name], ceilings, compile_seconds)
        yield case, measurement, floor
        gc.collect()
        torch.cuda.empty_cache()


def _lowered(target: CudaTarget, case: KernelCase) -> list[Launch] | EngineError:
    try:
        step = step_of(case)
        return family_of(step.op).lower(step, target.context)
    except EngineError as error:
        return error


def _measure(
    target: CudaTarget, case: KernelCase, launches: list[Launch] | EngineError, ceilings: Ceilings, seconds: float
) -> tuple[Measurement, float]:
    step = step_of(case)
    floor = ceilings.floor_us([(step.cost.flops, step.cost.bytes)])
    if isinstance(launches, EngineError):
        return Measurement(failure=reason(launches)), floor
    operands = Operands(step, peers.reference(case), launches, fills_of(case))
    entries = [
        Entry(peer.name, partial(peer_contender, peer, operands), peer.part is not None) for peer in peers.peers(case)
    ]
    if not seconds:
        return measure(lambda: our_contender(target, launches, operands), entries, TOLERANCE), floor
    with Remote(CompiledKernel(case), seconds) as remote:
        entries.insert(1, Entry(COMPILE, partial(remote.contender, COMPILE)))
        return measure(lambda: our_contender(target, launches, operands), entries, TOLERANCE), floor


def peer_contender(peer: peers.Peer, operands: Operands) -> GraphContender:
    """A peer on the same operands."""
    laid_out = [peer.lay_out(*inputs) for inputs in operands.inputs]
    check = operands.check if peer.part is None else operands.check_against(peer.part)
    return GraphContender(lambda i: peer.run(*laid_out[i]), operands.count, check)


def fills_of(case: KernelCase) -> Mapping[int, Fill]:
    """The inputs that are not random numbers: a padding mask."""
    if isinstance(case, AttentionCase) and case.mask is Mask.PADDING:
        return {3: _ragged}
    return {}


def _ragged(mask: torch.Tensor) -> None:
    """[batch, 1, 1, sequence]: 0 for the first keys, at least half of them, then −65504."""
    batch, _, _, sequence = mask.shape
    lengths = torch.randint(max(1, sequence // 2), sequence + 1, (batch, 1, 1, 1), device=mask.device)
    positions = torch.arange(sequence, device=mask.device)
    mask.copy_(torch.where(positions < lengths, 0.0, -65504.0))


@dataclass(frozen=True)
class CompiledKernel:
    """For a process of its own: the whole expression through torch.compile, in a CUDA graph on operands like ours."""

    case: KernelCase

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        return {COMPILE: self._compiled}

    def _compiled(self) -> Contender:
        torch.set_grad_enabled(False)
        full_precision()
        torch.backends.cudnn.benchmark = True
        eager = peers.eager(self.case)
        operands = Operands(step_of(self.case), peers.reference(self.case), fills=fills_of(self.case))
        compiled = peers.Peer(COMPILE, torch.compile(eager.run, dynamic=False), eager.lay_out)
        return peer_contender(compiled, operands)
