"""``python -m benchmarks kernels``: single kernels on the GPU beside PyTorch and the vendor's libraries."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.cases import KernelCase
from benchmarks.cases.attention import AttentionCase, Mask, VarlenCase
from benchmarks.cases.block import BlockCase
from benchmarks.cases.gemm import Epilogue, GemmCase
from benchmarks.gpu import peers
from benchmarks.gpu.operands import Fill, Operands, our_contender
from benchmarks.gpu.predictions import predicted_us
from benchmarks.gpu.remote import Remote
from benchmarks.gpu.steps import step_of
from benchmarks.gpu.timing import GraphContender, full_precision
from benchmarks.gpu.tuning import tell
from benchmarks.measure import Contender, Entry, Measurement, measure, reason
from benchmarks.results import Ceilings
from engine.errors import EngineError
from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda import conv_block
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.target import CudaTarget
from engine.targets.cuda.tuner import trials

TOLERANCE = 1e-2
COMPILE = "compile"
ALONE = "ours alone"
APART = "ours apart"


def measure_all(
    target: CudaTarget,
    cases: Sequence[KernelCase],
    ceilings: Ceilings,
    tune_seconds: float,
    compile_seconds: float,
    deadline: float,
) -> Iterator[tuple[KernelCase, Measurement, float, float | None]]:
    """(case, what came out, floor in µs, what the cost model predicts in µs), one after the other, as long as
    `deadline` (of `time.monotonic`) is not past. The tuner begins none after `tune_seconds`; then the kernels of
    all cases are compiled, in parallel. `compile_seconds` is how long torch.compile may take for a case; 0: it takes no
    part. Our product without a case's epilogue is one of its parts (`ours alone`), and the three convolutions of an
    inverted residual one after the other (`ours apart`): what is gained or added shows only in the same rounds."""
    begin = time.monotonic()
    full_precision()
    torch.backends.cudnn.benchmark = True
    steps = {case: step_of(case) for case in cases}
    steps |= {part: step_of(part) for part in map(alone, cases) if part is not None and part not in steps}
    if tune_seconds:
        _tune(target, [*steps.values()], min(deadline, begin + tune_seconds))
    lowered = {case: _lowered(target, step) for case, step in steps.items()}
    blocks = [case for case in cases if isinstance(case, BlockCase)]
    apart = {case: _lowered(target, steps[case], conv_block.lower_apart) for case in blocks}
    try:
        every = (*lowered.values(), *apart.values())
        target.device.load(launch.kernel for one in every for launch in one.launches)
    except EngineError as error:
        print(f"not every kernel compiles; each case will say so: {reason(error)}")
    print(f"tuning, lowering and compiling: {time.monotonic() - begin:.0f} s", flush=True)
    # What is there now lives to the end. Looking through PyTorch's objects after every case takes as long as a case.
    gc.collect()
    gc.freeze()
    for case in cases:
        if time.monotonic() >= deadline:
            return
        one, part = lowered[case], alone(case)
        with torch.inference_mode():
            floor = floor_us(one.step, ceilings)
            parts = list[Entry]()
            if part is not None:
                parts.append(Entry(ALONE, partial(_part_contender, target, part, lowered[part]), part=True))
            if isinstance(case, BlockCase):
                parts.append(Entry(APART, partial(_part_contender, target, case, apart[case]), part=True))
            measurement = _measure(target, case, one, parts, compile_seconds)
        yield case, measurement, floor, None if one.failure else predicted_us(one.step, target.context)
        gc.collect()
        torch.cuda.empty_cache()


def alone(case: KernelCase) -> GemmCase | None:
    """The product of a case without its epilogue, if it has one."""
    if not isinstance(case, GemmCase) or case.epilogue is Epilogue.NONE:
        return None
    return GemmCase(case.m, case.n, case.k)


def floor_us(step: Step, ceilings: Ceilings) -> float:
    """What its FLOPs and bytes take; the operands outgrow the cache. The FLOP ceiling is measured in fp16, and operands
    of 8 bits have twice that rate (NVIDIA's architecture paper)."""
    flops = step.cost.flops // (2 if step.inputs[0].dtype is DType.F8E4M3 else 1)
    return ceilings.floor_us([(flops, step.cost.bytes, 0)])


def _tune(target: CudaTarget, steps: Sequence[Step], deadline: float) -> None:
    """Let the tuner choose the tiles of products and convolutions, before any peer runs."""
    try:
        tell("kernels", trials(target, steps, timed=True, deadline=deadline))
    except EngineError as error:
        print(f"the tuner failed, the cost model's tiles are taken: {reason(error)}")


@dataclass(frozen=True)
class _Lowered:
    """A case's step with its launches, or why it has none."""

    step: Step
    launches: Sequence[Launch]
    failure: str = ""


def _lowered(target: CudaTarget, step: Step, lower: Callable[[Step, Context], list[Launch]] | None = None) -> _Lowered:
    """A step in the way of its family, or in another one."""
    try:
        return _Lowered(step, (lower or family_of(step.op).lower)(step, target.context))
    except EngineError as error:
        return _Lowered(step, (), reason(error))


def _measure(
    target: CudaTarget,
    case: KernelCase,
    lowered: _Lowered,
    parts: Sequence[Entry],
    compile_seconds: float,
) -> Measurement:
    if lowered.failure:
        return Measurement(failure=lowered.failure)
    operands = Operands(lowered.step, peers.reference(case), lowered.launches, fills_of(case))
    entries = [
        Entry(peer.name, partial(peer_contender, peer, operands), peer.part is not None) for peer in peers.peers(case)
    ]
    entries += parts
    ours = partial(our_contender, target, lowered.launches, operands)
    if not compile_seconds:
        return measure(ours, entries, TOLERANCE)
    with Remote(CompiledKernel(case), compile_seconds) as remote:
        entries.insert(1, Entry(COMPILE, partial(remote.contender, COMPILE)))
        return measure(ours, entries, TOLERANCE)


def _part_contender(target: CudaTarget, case: KernelCase, lowered: _Lowered) -> GraphContender:
    if lowered.failure:
        raise EngineError(lowered.failure)
    return our_contender(target, lowered.launches, Operands(lowered.step, peers.reference(case), lowered.launches))


def peer_contender(peer: peers.Peer, operands: Operands) -> GraphContender:
    """A peer on the same operands."""
    laid_out = [peer.lay_out(*inputs) for inputs in operands.inputs]
    check = operands.check if peer.part is None else operands.check_against(peer.part)
    return GraphContender(lambda i: peer.run(*laid_out[i]), operands.count, check, operands.pace)


def fills_of(case: KernelCase) -> Mapping[int, Fill]:
    """The inputs that are not random numbers: a padding mask, and where sequences start."""
    if isinstance(case, AttentionCase) and case.mask.is_tensor:
        return {3: _without_keys if case.mask is Mask.EMPTY else _ragged}
    if isinstance(case, VarlenCase):
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(case.lengths)]))
        return {3: lambda given: given.copy_(starts)}
    return {}


def _ragged(mask: torch.Tensor) -> None:
    """[batch, 1, 1, sequence]: 0 for the first keys, at least half of them, then −65504."""
    batch, _, _, sequence = mask.shape
    lengths = torch.randint(max(1, sequence // 2), sequence + 1, (batch, 1, 1, 1), device=mask.device)
    positions = torch.arange(sequence, device=mask.device)
    mask.copy_(torch.where(positions < lengths, 0.0, -65504.0))


def _without_keys(mask: torch.Tensor) -> None:
    """The same with −∞; every fourth sequence has no key."""
    _ragged(mask)
    mask[3::4] = -65504.0
    mask.masked_fill_(mask < 0, float("-inf"))


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
