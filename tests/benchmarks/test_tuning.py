"""The tuner before the benchmarks: which models, for how long. Needs the CUDA packages, no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cupy")

from benchmarks.cases.models import BERT, RESNET, ModelCase
from benchmarks.cases.packed import PackedCase
from benchmarks.gpu import tuning
from engine.errors import DeviceError
from engine.specs import TileTrial

CASES = (ModelCase(RESNET, 1), ModelCase(BERT, 1, 128), ModelCase(RESNET, 32))
FILES = {RESNET: Path("resnet.onnx"), BERT: Path("bert.onnx")}


class Tuned:
    """Models whose products take ten seconds each size; which were loaded, and what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: str = "") -> None:
        self.clock = 0.0
        self.asked: list[tuple[Path, Mapping[str, int], float]] = []
        self.broken = broken
        monkeypatch.setattr(tuning, "engine", SimpleNamespace(load=self.load))
        pool = SimpleNamespace(free_all_blocks=lambda: None)
        monkeypatch.setattr(tuning, "cupy", SimpleNamespace(get_default_memory_pool=lambda: pool))
        monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: self.clock))

    @contextmanager
    def load(self, path: Path, device: str, precision: str, strict: bool, packed: bool) -> Iterator[SimpleNamespace]:
        assert (device, precision, strict) == ("cuda:0", "fp16", True)
        if path.stem == self.broken:
            raise DeviceError("lost")

        def tune(sizes: Mapping[str, int], seconds: float) -> Iterator[TileTrial]:
            self.asked.append((path, sizes, seconds))
            self.clock += 10
            yield TileTrial("step", "one", "wgmma", 1.0, "products", 1.5, True)
            yield TileTrial("step", "other", "wgmma", 1.0, "products", None, True)

        def pack(feeds: Mapping[str, np.ndarray]) -> SimpleNamespace:
            rows, width = feeds["attention_mask"].shape
            sizes = {"batch": rows, "sequence": width, "tokens": int(feeds["attention_mask"].sum())}
            return SimpleNamespace(sizes=sizes)

        yield SimpleNamespace(tune=tune, pack=pack if packed else None)


def test_a_model_is_loaded_once_for_all_its_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = Tuned(monkeypatch)
    tuning.tune_models(CASES, FILES, 100.0)
    resnet, bert = FILES[RESNET], FILES[BERT]
    assert tuned.asked == [
        (resnet, {"batch": 1}, 100.0), (resnet, {"batch": 32}, 90.0), (bert, {"batch": 1, "sequence": 128}, 80.0),
    ]  # fmt: skip
    assert "resnet50 batch=1: timed 1 tiles of 1 of 2 products and convolutions: 10 s" in capsys.readouterr().out


def test_plans_on_packed_tokens_are_tuned_before_the_padded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, chosen = Tuned(monkeypatch), [PackedCase(BERT, batch, 128) for batch in (32, 128)]
    tuning.tune_models(chosen, FILES, 100.0)
    packed = [case.sizes | {"tokens": int(case.lengths.sum())} for case in chosen]
    plans = [*packed, *(case.sizes for case in chosen)]
    assert tuned.asked == [(FILES[BERT], sizes, 100.0 - 10 * number) for number, sizes in enumerate(plans)]


def test_no_model_is_begun_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = Tuned(monkeypatch)
    tuning.tune_models(CASES, FILES, 15.0)
    assert [path for path, _, _ in tuned.asked] == [FILES[RESNET]] * 2
    assert "the time for tuning is up before bert_base" in capsys.readouterr().out


def test_a_model_that_fails_is_said_and_the_next_one_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = Tuned(monkeypatch, broken="resnet")
    tuning.tune_models(CASES, FILES, 100.0)
    assert [path for path, _, _ in tuned.asked] == [FILES[BERT]]
    assert "resnet50 is not all tuned, the cost model's tiles are taken: " in capsys.readouterr().out
