"""``python -m benchmarks exports``: what the engine makes of models as exporters write them, on the CPU.

Every file runs padded and, where it can, on packed tokens, with the inputs that lie beside it, whose sequences have
several lengths, and with others of other sizes. Outputs are compared at real tokens: with PyTorch's that lie beside the
file, and with those of ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime

import engine
from benchmarks.cases.exports import ExportCase
from benchmarks.hashes import FIXTURES
from benchmarks.measure import Measurement, reason, worst
from engine.frontend import read_model
from engine.ir.ops import Attention

MASKS = ("attention_mask", "mask")
LENGTHS = (4, 11, 2)  # of the other sizes
LARGEST_ERROR = 1e-5
"""Relative L2 distance from ONNX Runtime, which computes in fp32 as well."""
LARGEST_CHANGE = 1e-3
"""From PyTorch, of a file in which ONNX Runtime's optimizer has put an approximation (FastGelu)."""

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Found:
    """What came out. `facts`: the opset, attentions recognised and of these packed, operators without a kernel;
    `producer` as the file says."""

    measurement: Measurement
    facts: Mapping[str, int] = field(default_factory=dict)
    producer: str = ""


def measure_all(
    cases: Iterable[ExportCase], deadline: float = math.inf, folder: Path = FIXTURES
) -> Iterator[tuple[ExportCase, Found]]:
    """One file after the other, until `deadline` (as `time.monotonic` has it)."""
    onnxruntime.set_default_logger_severity(4)
    for case in cases:
        if time.monotonic() >= deadline:
            return
        try:
            yield case, measure(case, folder)
        except Exception as problem:
            yield case, Found(Measurement(failure=reason(problem).replace(f"{folder}/", "")))


def measure(case: ExportCase, folder: Path = FIXTURES) -> Found:
    """Read, run and compare one file. Raises EngineError where the engine does not take it."""
    path = folder / f"{case.name}.onnx"
    _, info = read_model(path)
    with np.load(path.with_suffix(".npz")) as file:
        arrays = dict(file)
    given = {name.removeprefix("in_"): array for name, array in arrays.items() if name.startswith("in_")}
    torchs = [arrays[f"out_{i}"] for i in range(sum(name.startswith("out_") for name in arrays))]
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with (
        engine.load(path, device="cpu", packed=True) as packed,
        engine.load(path, device="cpu", packed=False) as padded,
    ):
        feeds = {spec.name: given[spec.name] for spec in packed.inputs}
        facts = {
            "opset": info.opsets[""],
            "attentions": sum(isinstance(node.op, Attention) for node in padded.graph.nodes),
            "packed": _packed_attentions(packed, feeds),
            "opaque": padded.fallback_ops,
        }
        if packed.why_padded:
            reasons["packed"] = packed.why_padded
        errors["PyTorch"] = _largest_error(packed, padded, feeds, torchs)
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            errors["ONNX Runtime"] = worst(
                _largest_error(packed, padded, some, session.run(None, some)) for some in (feeds, other_feeds(feeds))
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as problem:
            reasons["ONNX Runtime"] = reason(problem)
    failure = _failure(case, errors, facts)
    measurement = Measurement(rel_err=worst(errors.values()), errors=errors, reasons=reasons, failure=failure)
    return Found(measurement, facts, f"{info.producer} {info.producer_version}".strip())


def _failure(case: ExportCase, errors: Mapping[str, float], facts: Mapping[str, int]) -> str:
    for name, error in errors.items():
        bound = LARGEST_CHANGE if name == "PyTorch" and "fast_gelu" in case.name else LARGEST_ERROR
        if not error <= bound:
            return f"{error:.1e} from {name}"
    if facts["attentions"] != case.attentions:
        return f"{facts['attentions']} attentions recognised, of {case.attentions}"
    return f"{facts['opaque']} operators without a kernel" if facts["opaque"] else ""


def other_feeds(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of other sizes: the same tokens in sequences of other lengths; the first photo alone."""
    mask = mask_of(feeds)
    if mask is None:
        return {name: array[:1] for name, array in feeds.items()}
    rng = np.random.default_rng(0)
    real = np.arange(max(LENGTHS) + 1) < np.array(LENGTHS)[:, None]
    return {
        name: np.where(real, rng.choice(array[mask == 1], real.shape), array[mask == 0][0]).astype(array.dtype)
        for name, array in feeds.items()
    }


def mask_of(feeds: Mapping[str, Array]) -> Array | None:
    """The input that says which tokens are real; None for photos."""
    return next((feeds[name] for name in MASKS if name in feeds), None)


def _packed_attentions(model: engine.Model, feeds: Mapping[str, Array]) -> int:
    batch = model.pack(feeds)
    steps = model.plan(batch.sizes).steps if batch is not None else ()
    return sum(isinstance(step.op, Attention) and step.op.packed for step in steps)


def _largest_error(
    packed: engine.Model, padded: engine.Model, feeds: Mapping[str, Array], wanted: Sequence[Array]
) -> float:
    """The largest relative L2 distance of an output of either model from `wanted`, at real tokens."""
    mask = mask_of(feeds)
    errors = []
    for outputs in (_run_packed(packed, feeds), padded.run(feeds)):
        for got, want in zip(outputs.values(), wanted, strict=True):
            if got.shape != want.shape:
                raise ValueError(f"an output is {list(got.shape)} instead of {list(want.shape)}")
            shown = mask == 1 if mask is not None and want.shape[:2] == mask.shape else ...
            errors.append(float(np.linalg.norm(got[shown] - want[shown]) / np.linalg.norm(want[shown])))
    return worst(errors)


def _run_packed(model: engine.Model, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """On packed tokens, where the model can: also where that leaves out too little for `Model.run` to do it."""
    batch = model.pack(feeds)
    if batch is None:
        return model.run(feeds)
    with contextlib.closing(model.bind(batch.sizes)) as bound:
        for name, array in bound.inputs.items():
            array[...] = batch.arrays[name]
        bound.launch()
        return {name: array.copy() for name, array in bound.outputs.items()}
