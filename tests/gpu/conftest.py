"""Fixtures of the tests that need a GPU: both default models on it and on the CPU, and feeds for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import engine
from benchmarks.measure import worst


@dataclass(frozen=True)
class Both:
    """One model on the GPU, and in fp32 on the CPU."""

    gpu: engine.Model
    cpu: engine.Model

    def error(self, feeds: dict[str, np.ndarray]) -> float:
        """The largest relative L2 distance of an output on the GPU from that on the CPU."""
        got, expected = self.gpu.run(feeds), self.cpu.run(feeds)
        for name, array in expected.items():
            assert got[name].shape == array.shape and got[name].dtype == array.dtype
        return worst(relative_error(got[name], array) for name, array in expected.items())


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    a, b = got.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def image_feeds(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((batch, 3, 224, 224)).astype(np.float32)}


def token_feeds(batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; the rows of a batch have different lengths, so that the mask matters."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, sequence), np.int64)
    for row in range(1, batch):
        mask[row, rng.integers(1, sequence + 1) :] = 0
    ids = rng.integers(0, 30522, (batch, sequence)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _both(path: Path) -> Iterator[Both]:
    """Padded, so that all positions compare, and what lies at padded ones is looked at."""
    with (
        engine.load(path, device="cuda", strict=True, packed=False) as gpu,
        engine.load(path, device="cpu", packed=False) as cpu,
    ):
        yield Both(gpu, cpu)


@pytest.fixture(scope="session")
def efficientnet(efficientnet_lite0: Path) -> Iterator[Both]:
    yield from _both(efficientnet_lite0 / "1" / "model.onnx")


@pytest.fixture(scope="session")
def minilm(all_minilm_l6_v2: Path) -> Iterator[Both]:
    yield from _both(all_minilm_l6_v2 / "1" / "model.onnx")


Figures = Callable[[str], dict[str, float]]
"""Makes the row of a name, to be filled with figures; `pytest_terminal_summary` prints all rows."""


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    def row(name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        record_property(_FIGURES, (name, found))
        return found

    return row


_FIGURES = "figures"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of all tests that have some, also of those that ran in other processes."""
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ()))
    rows = [value for report in reports for name, value in report.user_properties if name == _FIGURES]
    for name, found in rows:
        cells = [f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.1e}" for key, value in found.items()]
        terminalreporter.write_line(f"{name:28} {'  '.join(cells)}")
