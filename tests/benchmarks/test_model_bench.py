"""A model and its peers getting ready and being measured, with PyTorch on the CPU in the place of a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("cupy")

import torch

import engine
from benchmarks.cases.models import MINILM, ModelCase
from benchmarks.gpu import models, networks, preparing, references
from benchmarks.models.store import model_file
from benchmarks.results import Ceilings
from tests.benchmarks.calls import Call, Graph

_COMPILED = (models.COMPILE, models.COMPILE_IN_GRAPH)
CASES = (ModelCase(MINILM, 1, 16), ModelCase(MINILM, 3, 33))


class Ours:
    """Our model on the CPU, with the outputs at padding that the reference has; at three rows there is no kernel."""

    def __init__(self, path: Path, threads: int) -> None:
        self._model = engine.load(path, device="cpu", threads=threads, packed=False)
        self.prepared: list[str] = []

    def prepare(self, case: ModelCase) -> None:
        self.prepared.append(case.name)

    def contender(self, case: ModelCase, expected: Mapping[str, np.ndarray]) -> Call:
        assert case.name in self.prepared
        if case.batch == 3:
            raise RuntimeError("no kernel for three rows")
        ((name, reference),) = expected.items()
        assert reference.dtype == np.float64
        return Call(lambda: torch.from_numpy(self._model.run(case.feeds())[name]), models.check_of(reference))

    def floor(self, case: ModelCase, ceilings: Ceilings) -> float:
        return 1.5

    def run_us(self, feeds: Mapping[str, Any]) -> float:
        return 2.5

    def host_us(self, case: ModelCase) -> Mapping[str, float]:
        return {models.EXECUTABLE: 3.5}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "network", partial(networks.network, device="cpu", dtype=torch.float32))
    monkeypatch.setattr(preparing, "References", partial(references.References, "cpu"))
    monkeypatch.setattr(models, "CallContender", Call)
    monkeypatch.setattr(models, "GraphContender", Graph)
    monkeypatch.setattr(models, "_OurModel", Ours)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def recipe(path: Path, seconds: float) -> models.ModelRecipe:
    compiled = (CASES[0].name,)
    return models.ModelRecipe(CASES, path, Ceilings(1e12, 1e12), 2, compiled, time.monotonic() + seconds)


def test_ours_and_the_peers_are_measured_and_what_fails_costs_its_own_case(
    on_the_cpu: None, model_repository: Path
) -> None:
    chosen = recipe(model_file(model_repository, MINILM), 0.0)
    bench = chosen.build()
    first, second = (bench.measure(name) for name in chosen.names)
    found = first.measurement
    assert found.failure == ""
    assert found.rel_err is not None and found.rel_err < 1e-5
    assert list(found.peers) == [models.EAGER, models.COMPILE, models.COMPILE_IN_GRAPH]
    assert found.peers[models.EAGER] is not None
    assert set(found.reasons) == set(_COMPILED)
    assert all(reason.startswith("not done in time") for reason in found.reasons.values())
    assert (first.floor_us, first.run_us, first.host_us) == (1.5, 2.5, {models.EXECUTABLE: 3.5})
    assert second.measurement.failure == "no kernel for three rows"
    assert (second.run_us, second.host_us) == (None, {})
    again = chosen.plain().build().measure(CASES[0].name).measurement
    assert again.failure == ""
    assert again.peers[models.EAGER] is not None
    assert again.reasons == dict.fromkeys(_COMPILED, "the process that compiled it crashed, or had to be ended")


@pytest.mark.slow
def test_torch_compile_takes_part_once_it_is_done(on_the_cpu: None, model_repository: Path) -> None:
    chosen = recipe(model_file(model_repository, MINILM), 300.0)
    found = chosen.build().measure(CASES[0].name).measurement
    assert found.reasons == {}
    assert all(us is not None for us in found.peers.values())
