"""``python -m benchmarks accuracy`` and tests/gpu/test_architectures.py: how far a model in some precision is from
fp32, of how many steps and kernels it is made, and what memory it takes. No time is measured: as many processes as the
machine has cores for work at once, each on some precisions of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

import engine
from benchmarks.cases import accuracy
from benchmarks.cases.accuracy import BOUNDS, AccuracyCase
from benchmarks.cases.models import ModelCase
from benchmarks.gpu.executables import compile_threads, distinct_kernels, executable, limit_compiler
from benchmarks.measure import Measurement, reason, worst
from benchmarks.workers import all_at_once, groups
from engine.ir.ops import Opaque

Outputs = Mapping[str, np.ndarray]
Facts = dict[str, int]

BUCKETS_PRECISION = "fp16"
"""Plans for all buckets are made in this precision only: memory is what matters, and in the others it is alike."""


@dataclass(frozen=True)
class Finding:
    """What came out of a case."""

    measurement: Measurement
    facts: Facts


def measure_all(
    cases: Sequence[AccuracyCase], files: Mapping[str, Path], deadline: float, workers: int
) -> Iterator[tuple[AccuracyCase, Finding]]:
    """Every case with what came out, in the order in which they come, until `deadline` (of `time.monotonic`).
    `workers`: the most processes at once."""
    by_name = {case.name: case for case in cases}
    shares = groups([(case.model, case) for case in cases], workers)
    threads = compile_threads(len(shares))
    recipes = [AccuracyRecipe(tuple(share), files[share[0].model], threads) for share in shares]
    for name, found in all_at_once(recipes, {"OMP_NUM_THREADS": str(threads)}, deadline):
        yield by_name[name], Finding(Measurement(failure=found), {}) if isinstance(found, str) else found


@dataclass(frozen=True)
class AccuracyRecipe:
    """Some precisions of one model, for a process of its own."""

    cases: tuple[AccuracyCase, ...]
    path: Path
    threads: int

    @property
    def names(self) -> Sequence[str]:
        return [case.name for case in self.cases]

    def build(self) -> AccuracyBench:
        from benchmarks.gpu.references import References, free  # which need PyTorch

        twins = References(threads=self.threads)
        sizes = accuracy.compared(self.cases[0].model)
        expected = {one.name: twins.of(one, self.path) for one in sizes}
        del twins
        free()
        return AccuracyBench(self, expected)

    def plain(self) -> AccuracyRecipe:
        return self


@dataclass(frozen=True)
class AccuracyBench:
    """The precisions of one model, with the references of its sizes by their names."""

    recipe: AccuracyRecipe
    expected: Mapping[str, Outputs]

    def measure(self, name: str) -> Finding:
        (case,) = (case for case in self.recipe.cases if case.name == name)
        facts: Facts = {}
        try:
            with engine.load(
                self.recipe.path, device="cuda", precision=case.precision, strict=True, packed=False
            ) as model:
                limit_compiler(model, self.recipe.threads)
                facts |= steps_and_memory(model, case.model)
                errors = {
                    sizes.name: error(model, sizes, self.expected[sizes.name])
                    for sizes in accuracy.compared(case.model)
                }
            if case.precision == BUCKETS_PRECISION:
                facts |= memory_of_buckets(self.recipe.path, case.model, self.recipe.threads)
        except Exception as problem:
            return Finding(Measurement(failure=reason(problem)), facts)
        return Finding(judged(errors, BOUNDS[case.precision]), facts)


def judged(errors: Mapping[str, float], bound: float) -> Measurement:
    """The worst of the errors by size; which sizes are beyond the bound is a failure."""
    largest = worst(errors.values())
    beyond = [f"{size}: {found:.1e}" for size, found in errors.items() if not found <= bound]
    failure = f"relative error above {bound:g} at {', '.join(beyond)}" if beyond else ""
    rounded = {size.partition(" ")[2]: float(f"{found:.1e}") for size, found in errors.items()}
    return Measurement(rel_err=float(f"{largest:.1e}"), errors=rounded, failure=failure)


def references(name: str, path: Path, threads: int = 0) -> dict[str, Outputs]:
    """The outputs of ONNX Runtime on the CPU in fp32, by the name of the sizes: for the tests, which need no PyTorch.
    `threads`: 0 for all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        sizes.name: dict(zip(names, session.run(names, sizes.feeds()), strict=True))
        for sizes in accuracy.compared(name)
    }


def error(model: engine.Model, sizes: ModelCase, expected: Outputs) -> float:
    """The largest relative L2 distance of an output from the reference; infinite where shapes differ."""
    found = model.run(sizes.feeds())
    return worst(_distance(found[name], array) for name, array in expected.items())


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


def steps_and_memory(model: engine.Model, name: str) -> Facts:
    """Steps, operators without a kernel and distinct kernels of a small plan; of a plan at batch 128 the bytes of the
    arena and those of all intermediate tensors, which share it."""
    small, large = model.plan(accuracy.compared(name)[0].sizes), model.plan(accuracy.largest(name).sizes)
    bound = executable(model, small)
    facts = {
        "steps": len(small.steps),
        "opaque": sum(isinstance(step.op, Opaque) for step in small.steps),
        "kernels": distinct_kernels(bound),
        "arena_bytes": large.arena_bytes,
        "activations_bytes": large.unshared_bytes,
    }
    bound.close()
    return facts


def memory_of_buckets(path: Path, name: str, threads: int) -> Facts:
    """Bytes of weights, and of everything, of a model that was just loaded, with plans for eight buckets ready;
    `weights_growth`: how many bytes of weights the other seven plans added to those of the largest. `threads`: that
    compile."""
    plans = sorted(accuracy.buckets(name), key=lambda sizes: -sizes.batch * max(1, sizes.sequence))
    first: Mapping[str, int] | None = None
    with engine.load(path, device="cuda", precision=BUCKETS_PRECISION, strict=True, packed=False) as model:
        limit_compiler(model, threads)
        for sizes in plans:
            model.run(sizes.feeds())
            first = first or model.memory()
        assert first is not None
        memory = model.memory()
        return {
            "plans": model.plans_ready,
            "weights_bytes": memory["weights"],
            "weights_growth": memory["weights"] - first["weights"],
            "buckets_bytes": sum(memory.values()),
        }
