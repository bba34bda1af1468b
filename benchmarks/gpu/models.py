"""``python -m benchmarks models``: whole models on the GPU, checked against float64 (`references.py`), beside the same
network with the same weights in PyTorch: eager in a CUDA graph, and through torch.compile.

Everything that takes long is done first, by one process for some cases of one model, all processes at once: references,
our kernels (into the cache on disk), torch.compile. Then the cases are timed one at a time, ours and all peers in turn
in one process, while all others wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import cupy
import numpy as np
import torch
import torch._dynamo

import engine
from benchmarks.cases.models import ModelCase
from benchmarks.gpu.executables import compile_threads, executable, host_us, limit_compiler
from benchmarks.gpu.networks import network
from benchmarks.gpu.pace import COOL, Pace, pace_of
from benchmarks.gpu.preparing import Compilations, outcomes, references, told
from benchmarks.gpu.references import free
from benchmarks.gpu.timing import CallContender, Check, GraphContender, full_precision, relative_error
from benchmarks.measure import Contender, Entry, Measurement, measure, worst
from benchmarks.results import Ceilings
from benchmarks.workers import groups
from engine.plan.plan import Plan
from engine.targets.cuda.target import Executable

TOLERANCE = 5e-3
EAGER, COMPILE, COMPILE_IN_GRAPH = "eager", "compile", "compile in a graph"
EXECUTABLE, BOUND = "Executable.launch", "BoundModel.launch"
_MODES = {COMPILE: "reduce-overhead", COMPILE_IN_GRAPH: None}
_RUN_SECONDS = 0.5
_PREPARE_SECONDS = 120.0  # for references and our kernels, where torch.compile takes no part
_RECOMPILES = 64  # PyTorch's own limit of 8 is for sizes and modes of one function together


@dataclass(frozen=True)
class Outcome:
    """A measurement, the floor in µs, µs of `Model.run` with its copies (None where ours failed), and µs of the host's
    part of a run by what is called."""

    measurement: Measurement
    floor_us: float | None = None
    run_us: float | None = None
    host_us: Mapping[str, float] = field(default_factory=dict)


def measure_all(
    cases: Sequence[ModelCase],
    files: Mapping[str, Path],
    ceilings: Ceilings,
    compiled: Sequence[ModelCase],
    compile_until: float,
    deadline: float,
    workers: int,
) -> Iterator[tuple[ModelCase, Outcome]]:
    """Every case with what came out, as long as `deadline` is not past. `files` has the model file of each.

    torch.compile takes part in the cases of `compiled`, and stops at `compile_until`. Both are times of
    `time.monotonic`. `workers`: the most processes at once.
    """
    by_name = {case.name: case for case in cases}
    shares = groups([(case.model, case) for case in cases], workers)
    threads = compile_threads(len(shares))
    recipes = [
        ModelRecipe(
            tuple(share),
            files[share[0].model],
            ceilings,
            threads,
            tuple(case.name for case in share if case in compiled),
            compile_until,
        )
        for share in shares
    ]
    until = compile_until if compiled else None
    for name, outcome in outcomes(recipes, threads, _PREPARE_SECONDS, until, deadline):
        yield by_name[name], Outcome(Measurement(failure=outcome)) if isinstance(outcome, str) else outcome


@dataclass(frozen=True)
class ModelRecipe:
    """Some sizes of one model, for a process of its own; `compiled` names those with torch.compile, `given_up` says why
    that is not even tried."""

    cases: tuple[ModelCase, ...]
    path: Path
    ceilings: Ceilings
    threads: int
    compiled: tuple[str, ...]
    compile_until: float
    given_up: str = ""

    @property
    def names(self) -> Sequence[str]:
        return [case.name for case in self.cases]

    def build(self) -> ModelBench:
        return ModelBench(self)

    def plain(self) -> ModelRecipe:
        return replace(self, given_up="the process that compiled it crashed, or had to be ended")


class ModelBench:
    """The sizes of one model, ready to be timed."""

    def __init__(self, recipe: ModelRecipe) -> None:
        begin = time.monotonic()
        self._recipe = recipe
        self._cases = {case.name: case for case in recipe.cases}
        settle(recipe.threads)
        self._expected, self._failures = references(recipe.cases, recipe.path, recipe.threads)
        prepared = time.monotonic()
        self._ours = _OurModel(recipe.path, recipe.threads)
        for case in recipe.cases:
            self._ours.prepare(case)
        loaded = time.monotonic()
        self._net = network(recipe.cases[0].model, recipe.path)
        self._compiled = Compilations(recipe.compile_until, recipe.given_up)
        for kind, mode in _MODES.items():
            for name in recipe.compiled:
                arguments = self._net.arguments(self._cases[name].feeds())
                self._compiled.add(name, kind, self._net.call, arguments, mode)
        free()
        told(list(self._cases), begin, prepared, loaded, len(self._compiled))

    def measure(self, name: str) -> Outcome:
        """Check and time one case."""
        case = self._cases[name]
        floor_us = self._ours.floor(case, self._recipe.ceilings)
        if name in self._failures:
            return Outcome(Measurement(failure=self._failures[name]), floor_us)
        expected = self._expected[name]
        arguments = self._net.arguments(case.feeds())
        check, pace = check_of(expected[self._net.output]), self._ours.pace(case)
        entries = [Entry(EAGER, lambda: GraphContender(lambda _: self._net.call(*arguments), 1, check, pace))]
        if name in self._recipe.compiled:
            self._record(name, arguments)
            entries.append(Entry(COMPILE, partial(self._called, name, arguments, check, pace)))
            entries.append(Entry(COMPILE_IN_GRAPH, partial(self._in_graph, name, arguments, check, pace)))
        measurement = measure(lambda: self._ours.contender(case, expected), entries, TOLERANCE)
        free()
        if measurement.failure:
            return Outcome(measurement, floor_us)
        return Outcome(measurement, floor_us, self._ours.run_us(case.feeds()), self._ours.host_us(case))

    def _record(self, name: str, arguments: tuple[torch.Tensor, ...]) -> None:
        """Have mode reduce-overhead record its graphs, if it can: `_called` says what is wrong otherwise. Recording
        frees cuBLAS's workspaces, so it comes before any graph here is captured that has their addresses."""
        compiled = self._compiled.get(name, COMPILE)
        if compiled is not None:
            with suppress(Exception):
                for _ in range(3):  # records, and replays
                    compiled(*arguments)
                torch.cuda.synchronize()

    def _called(self, name: str, arguments: tuple[torch.Tensor, ...], check: Check, pace: Pace) -> Contender:
        """As a user would: mode reduce-overhead, which makes CUDA graphs of its own, called from Python."""
        compiled = self._compiled.found(name, COMPILE)
        return CallContender(lambda: compiled(*arguments), check, pace)

    def _in_graph(self, name: str, arguments: tuple[torch.Tensor, ...], check: Check, pace: Pace) -> Contender:
        """In a CUDA graph of ours, without the host's part of a call."""
        compiled = self._compiled.found(name, COMPILE_IN_GRAPH)
        return GraphContender(lambda _: compiled(*arguments), 1, check, pace)


def settle(threads: int) -> None:
    """PyTorch as references and peers want it."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    full_precision()
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = _RECOMPILES
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def run_us(model: engine.Model, feeds: Mapping[str, np.ndarray]) -> float:
    """The median of `Model.run` calls, NumPy arrays to NumPy arrays."""
    times: list[float] = []
    end = time.perf_counter() + _RUN_SECONDS
    model.run(feeds)
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        model.run(feeds)
        times.append(time.perf_counter() - begin)
    return median(times) * 1e6


def check_of(expected: np.ndarray) -> Check:
    """Compares a result with the reference, on the CPU."""
    wanted = torch.from_numpy(expected)
    return lambda _, result: relative_error(result.float().cpu(), wanted)


class _OurModel:
    """One of our models, in fp16 whatever `auto` would choose: the peers are."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = engine.load(path, device="cuda:0", precision="fp16", strict=True)
        limit_compiler(self.model, threads)
        self._ready: dict[str, tuple[Plan, Executable] | Exception] = {}

    def prepare(self, case: ModelCase) -> None:
        """Plan and bind a case: its kernels are compiled and loaded. What fails is said by `contender`."""
        try:
            plan = self.model.plan(case.sizes)
            self._ready[case.name] = plan, executable(self.model, plan)
        except Exception as problem:
            self._ready[case.name] = problem

    def contender(self, case: ModelCase, expected: Mapping[str, np.ndarray]) -> Contender:
        found = self._ready[case.name]
        if isinstance(found, Exception):
            raise found
        plan, bound = found
        return _OurContender(bound, plan, case.feeds(), expected)

    def pace(self, case: ModelCase) -> Pace:
        """That of all contenders of a case."""
        found = self._ready[case.name]
        return COOL if isinstance(found, Exception) else pace_of(found[0].steps)

    def floor(self, case: ModelCase, ceilings: Ceilings) -> float | None:
        """Microseconds that the steps take at least; None without a plan."""
        found = self._ready[case.name]
        return None if isinstance(found, Exception) else ceilings.plan_floor_us(found[0])

    def run_us(self, feeds: Mapping[str, np.ndarray]) -> float:
        """Microseconds of `Model.run`."""
        return run_us(self.model, feeds)

    def host_us(self, case: ModelCase) -> Mapping[str, float]:
        """The host's part of a run that nothing waits for, by what is called."""
        found = self._ready[case.name]
        assert not isinstance(found, Exception)
        bound = self.model.bind(case.sizes)
        try:
            return {EXECUTABLE: host_us(found[1].launch), BOUND: host_us(bound.launch)}
        finally:
            bound.close()


class _OurContender(CallContender):
    """Replays the plan's graph on its inputs as they lie in device memory."""

    def __init__(
        self,
        executable: Executable,
        plan: Plan,
        feeds: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__(self._queue, lambda i, result: 0.0, pace_of(plan.steps))
        self._executable = executable
        self._plan = plan
        self._feeds = feeds
        self._expected = expected

    def error(self) -> float:
        """The largest error of an output, all of them poisoned before. Leaves the inputs in device memory."""
        shapes = {name: (tensor.shape, tensor.dtype.numpy) for name, tensor in self._plan.outputs.items()}
        outputs = {name: np.full(shape, np.nan, dtype) for name, (shape, dtype) in shapes.items()}
        self._executable.run(self._feeds, outputs)
        return worst(check_of(self._expected[name])(0, torch.from_numpy(array)) for name, array in outputs.items())

    def _queue(self) -> None:
        self._executable.launch(cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))
