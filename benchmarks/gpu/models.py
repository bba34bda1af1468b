"""``python -m benchmarks models``: whole models on the GPU, checked against fp32 (`references.py`), beside the same
network with the same weights in PyTorch: eager in a CUDA graph, and through torch.compile."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

import cupy
import numpy as np
import torch

import engine
from benchmarks.cases.models import ModelCase
from benchmarks.gpu.executables import executable
from benchmarks.gpu.networks import network
from benchmarks.gpu.references import References
from benchmarks.gpu.remote import Remote
from benchmarks.gpu.timing import CallContender, Check, GraphContender, relative_error
from benchmarks.measure import Contender, Entry, Measurement, measure, reason
from benchmarks.results import Ceilings
from engine.plan.plan import Plan
from engine.targets.cuda.target import Executable

TOLERANCE = 5e-3
COMPILE, COMPILE_IN_GRAPH = "compile", "compile in a graph"
_RUN_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """A measurement, the floor in µs, and µs of `Model.run` with its copies (None where ours failed)."""

    measurement: Measurement
    floor_us: float
    run_us: float | None


def measure_all(
    cases: Sequence[ModelCase],
    files: Mapping[str, Path],
    ceilings: Ceilings,
    compile_seconds: float,
    compiled: Sequence[ModelCase],
) -> Iterator[tuple[ModelCase, Outcome]]:
    """One case after the other. `files` has the model file of each.

    torch.compile begins with all of the cases in `compiled` at once and has `compile_seconds`; 0: it takes no part.
    """
    begin = time.monotonic()
    torch.backends.cudnn.benchmark = True
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        expected = {case.name: Path(scratch) / f"{i}.npz" for i, case in enumerate(cases)}
        remotes: dict[str, Remote] = {}
        for case in compiled if compile_seconds else ():
            recipe = CompiledModel(case, files[case.model], expected[case.name])
            remotes[case.name] = stack.enter_context(Remote(recipe, compile_seconds))
        failures = dict(_prepare_references(cases, files, expected))
        ours = {name: _OurModel(files[name]) for name in dict.fromkeys(case.model for case in cases)}
        for model in ours.values():
            stack.callback(model.close)
        for remote in remotes.values():
            remote.wait()  # nothing else is to run while something is timed
        print(f"references and torch.compile: {time.monotonic() - begin:.0f} s", flush=True)
        for case in cases:
            model = ours[case.model]
            if case.name in failures:
                measurement = Measurement(failure=failures[case.name])
                yield case, Outcome(measurement, model.floor(case, ceilings), None)
                continue
            outputs = dict(np.load(expected[case.name]))
            with torch.inference_mode():
                yield case, _measure(case, model, outputs, files[case.model], remotes.get(case.name), ceilings)
            gc.collect()
            torch.cuda.empty_cache()


_network = lru_cache(maxsize=1)(network)


def _prepare_references(
    cases: Sequence[ModelCase], files: Mapping[str, Path], expected: Mapping[str, Path]
) -> Iterator[tuple[str, str]]:
    """Write the reference of every case into its file; the cases that have none, and why."""
    references = References()
    for case in cases:
        try:
            found = references.of(case, files[case.model])
        except Exception as problem:
            yield case.name, f"no reference: {reason(problem)}"
        else:
            np.savez(expected[case.name], **found)  # type: ignore[arg-type]
    del references
    torch.cuda.empty_cache()


def _measure(
    case: ModelCase,
    ours: _OurModel,
    expected: Mapping[str, np.ndarray],
    file: Path,
    remote: Remote | None,
    ceilings: Ceilings,
) -> Outcome:
    def eager() -> Contender:
        net = _network(case.model, file)
        arguments = net.arguments(case.feeds())
        return GraphContender(lambda _: net.call(*arguments), 1, check_of(expected[net.output]))

    entries = [Entry("eager", eager)]
    if remote is not None:
        entries += [Entry(name, partial(remote.contender, name)) for name in (COMPILE, COMPILE_IN_GRAPH)]
    measurement = measure(lambda: ours.contender(case, expected), entries, TOLERANCE)
    return Outcome(measurement, ours.floor(case, ceilings), None if measurement.failure else ours.run_us(case.feeds()))


def check_of(expected: np.ndarray) -> Check:
    """Compares a result with the reference, on the CPU."""
    wanted = torch.from_numpy(expected)
    return lambda _, result: relative_error(result.float().cpu(), wanted)


class _OurModel:
    """One of our models, in fp16 whatever `auto` would choose: the peers are."""

    def __init__(self, path: Path) -> None:
        self.model = engine.load(path, device="cuda:0", precision="fp16", strict=True)

    def contender(self, case: ModelCase, expected: Mapping[str, np.ndarray]) -> Contender:
        plan = self.model.plan(case.sizes)
        return _OurContender(executable(self.model, plan), plan, case.feeds(), expected)

    def floor(self, case: ModelCase, ceilings: Ceilings) -> float:
        """Microseconds that the steps take at least."""
        return ceilings.plan_floor_us(self.model.plan(case.sizes))

    def run_us(self, feeds: Mapping[str, np.ndarray]) -> float:
        """The median of `Model.run` calls, NumPy arrays to NumPy arrays."""
        times: list[float] = []
        end = time.perf_counter() + _RUN_SECONDS
        self.model.run(feeds)
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            self.model.run(feeds)
            times.append(time.perf_counter() - begin)
        return median(times) * 1e6

    def close(self) -> None:
        self.model.close()


class _OurContender(CallContender):
    """Replays the plan's graph on its inputs as they lie in device memory."""

    def __init__(
        self,
        executable: Executable,
        plan: Plan,
        feeds: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__(self._queue, lambda i, result: 0.0)
        self._executable = executable
        self._plan = plan
        self._feeds = feeds
        self._expected = expected

    def error(self) -> float:
        """The largest error of an output, all of them poisoned before. Leaves the inputs in device memory."""
        shapes = {name: (tensor.shape, tensor.dtype.numpy) for name, tensor in self._plan.outputs.items()}
        outputs = {name: np.full(shape, np.nan, dtype) for name, (shape, dtype) in shapes.items()}
        self._executable.run(self._feeds, outputs)
        return max(check_of(self._expected[name])(0, torch.from_numpy(array)) for name, array in outputs.items())

    def _queue(self) -> None:
        self._executable.launch(cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))


@dataclass(frozen=True)
class CompiledModel:
    """For a process of its own: the network through torch.compile, called as a user would (mode reduce-overhead, which
    makes CUDA graphs of its own), and in a CUDA graph of ours, without the host's part of a call.

    `expected` is a file that holds the reference by the time the contenders are checked.
    """

    case: ModelCase
    path: Path
    expected: Path

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        torch.set_grad_enabled(False)
        torch.backends.cudnn.benchmark = True
        net = network(self.case.model, self.path)
        arguments = net.arguments(self.case.feeds())

        def check(_: int, result: torch.Tensor) -> float:
            return check_of(np.load(self.expected)[net.output])(0, result)

        def called() -> Contender:
            compiled = torch.compile(net.call, mode="reduce-overhead", dynamic=False)
            for _ in range(4):  # compiles, records its graphs, replays them
                compiled(*arguments)
            torch.cuda.synchronize()
            return CallContender(lambda: compiled(*arguments), check)

        def in_graph() -> Contender:
            compiled = torch.compile(net.call, dynamic=False)
            return GraphContender(lambda _: compiled(*arguments), 1, check)

        return {COMPILE: called, COMPILE_IN_GRAPH: in_graph}
