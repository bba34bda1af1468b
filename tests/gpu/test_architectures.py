"""Seven well-known architectures and the two default models on the GPU, in every precision: distance from fp32, nothing
but kernels of ours, steps, memory. The figures are printed at the end (`tests/gpu/conftest.py`).

All tests of one model run in one process, which builds it and computes its references once:
``pytest tests/gpu/test_architectures.py -n 4 --dist loadgroup``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from benchmarks.cases.accuracy import BOUNDS
from benchmarks.cases.models import ARCHITECTURES, DEFAULTS
from benchmarks.measure import worst
from benchmarks.models.store import build_here, model_file
from tests.gpu.conftest import Figures

pytestmark = pytest.mark.gpu

# The goals of the passes, at the smallest sizes; of the default models what the plan of the CPU target has.
MOST_STEPS = {
    "efficientnet-lite0": 51,
    "all-minilm-l6-v2": 45,
    "resnet50": 55,
    "vgg16": 21,
    "mobilenet_v2": 54,
    "efficientnet_b0": 67,
    "vit_b_16": 87,
    "bert_base": 87,
    "gpt2": 87,
}
IN_32_BITS = {"efficientnet_b0": 115}
"""Squeeze-and-excite blocks are steps of their own."""
_MOST_GROWTH = 0.25
"""Of the bytes of weights, that plans of other batches add. Depthwise filters lie in two ways, for kernels that suit
few or many images: 0.16 of MobileNetV2's bytes. A plan that shared nothing would add them all."""


def most_steps(name: str, precision: str) -> int:
    return (IN_32_BITS if precision in ("tf32", "fp32") else MOST_STEPS).get(name, MOST_STEPS[name])


@dataclass(frozen=True)
class Subject:
    """A model under test: its file, and its outputs in fp32 by the name of the sizes."""

    name: str
    path: Path
    expected: Mapping[str, Mapping[str, object]]


def _subject(name: str, repository: Path) -> Subject:
    from benchmarks.gpu.accuracy import references

    path = model_file(repository, name)
    if name in ARCHITECTURES:
        build_here(name, repository)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return Subject(name, path, references(name, path, max(1, (os.cpu_count() or 1) // workers)))


def _params() -> Iterator[object]:
    for name in (*ARCHITECTURES, *DEFAULTS):
        yield pytest.param(name, marks=pytest.mark.xdist_group(name), id=name)


@pytest.fixture(scope="module", params=_params())
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name = request.param
    built: Path = request.getfixturevalue("model_repository") if name in DEFAULTS else tmp_path_factory.mktemp(name)
    return _subject(name, built)


@pytest.mark.parametrize("precision", BOUNDS)
def test_a_model_in_a_precision(subject: Subject, precision: str, figures: Figures) -> None:
    from benchmarks.cases import accuracy
    from benchmarks.gpu.accuracy import BUCKETS_PRECISION, error, memory_of_buckets, steps_and_memory

    row = figures(f"{subject.name} {precision}")
    with engine.load(subject.path, device="cuda", precision=precision, strict=True, packed=False) as model:
        assert model.precision == precision
        assert model.fallback_ops == 0
        row |= steps_and_memory(model, subject.name)
        assert row["opaque"] == 0
        assert row["steps"] <= most_steps(subject.name, precision)
        assert 0 < row["kernels"] <= row["steps"]
        assert row["arena_bytes"] < row["activations_bytes"]
        errors = {}
        for sizes in accuracy.compared(subject.name):
            errors[sizes.name] = error(model, sizes, subject.expected[sizes.name])
        row["error"] = worst(errors.values())
        assert all(found <= BOUNDS[precision] for found in errors.values()), errors
    if precision == BUCKETS_PRECISION:
        row |= memory_of_buckets(subject.path, subject.name, os.cpu_count() or 1)
        assert row["plans"] == len(accuracy.buckets(subject.name))
        assert row["weights_growth"] < _MOST_GROWTH * row["weights_bytes"], "plans share what they pack"
