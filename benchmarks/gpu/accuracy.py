"""``python -m benchmarks accuracy`` and tests/gpu/test_architectures.py: how far a model in some precision is from
fp32, of how many steps and kernels it is made, and what memory it takes. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

import engine
from benchmarks.cases import accuracy
from benchmarks.cases.accuracy import BOUNDS, AccuracyCase
from benchmarks.cases.models import ModelCase
from benchmarks.gpu.executables import distinct_kernels, executable
from benchmarks.measure import Measurement, reason
from engine.ir.ops import Opaque

Outputs = Mapping[str, np.ndarray]
Facts = dict[str, int]

BUCKETS_PRECISION = "fp16"
"""Plans for all buckets are made in this precision only: memory is what matters, and in the others it is alike."""


def measure_all(
    cases: Sequence[AccuracyCase], files: Mapping[str, Path]
) -> Iterator[tuple[AccuracyCase, Measurement, Facts]]:
    """One case after the other; the references of a model are computed once."""
    for name in dict.fromkeys(case.model for case in cases):
        expected = references(name, files[name])
        for case in cases:
            if case.model == name:
                yield case, *_measured(case, files[name], expected)


def _measured(case: AccuracyCase, path: Path, expected: Mapping[str, Outputs]) -> tuple[Measurement, Facts]:
    facts: Facts = {}
    try:
        with engine.load(path, device="cuda", precision=case.precision, strict=True) as model:
            facts |= steps_and_memory(model, case.model)
            worst = max(error(model, sizes, expected[sizes.name]) for sizes in accuracy.compared(case.model))
            if case.precision == BUCKETS_PRECISION:
                facts |= memory_of_buckets(model, case.model)
    except Exception as problem:
        return Measurement(failure=reason(problem)), facts
    bound = BOUNDS[case.precision]
    failure = "" if worst <= bound else f"relative error {worst:.1e}, above {bound:g}"
    return Measurement(rel_err=float(f"{worst:.1e}"), failure=failure), facts


def references(name: str, path: Path, threads: int = 0) -> dict[str, Outputs]:
    """The outputs of ONNX Runtime on the CPU in fp32, by the name of the sizes. `threads`: 0 for all cores."""
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
    return max(_distance(found[name], array) for name, array in expected.items())


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


def memory_of_buckets(model: engine.Model, name: str) -> Facts:
    """Bytes of weights, and of everything, with plans for eight buckets ready; `weights_growth`: how many bytes of
    weights the other seven plans added to those of the largest."""
    plans = sorted(accuracy.buckets(name), key=lambda sizes: -sizes.batch * max(1, sizes.sequence))
    first: Mapping[str, int] | None = None
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
