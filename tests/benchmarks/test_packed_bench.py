"""An encoder on packed tokens and its peers getting ready and being measured, with the CPU in the place of a GPU."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("cupy")

import torch
from torch.nested._internal import sdpa

import engine
from benchmarks import cases
from benchmarks import packed as said
from benchmarks.__main__ import main
from benchmarks.cases.models import MINILM
from benchmarks.cases.packed import PackedCase
from benchmarks.gpu import models, networks, packed, packed_ours, preparing, real_tokens, references, session
from benchmarks.gpu.jagged import JaggedBert, jagged
from benchmarks.models.store import model_file
from benchmarks.results import Ceilings, Device, Results, Run
from benchmarks.tables import regenerated
from engine.model import BoundModel
from tests.benchmarks.calls import Call, Graph

CASE = PackedCase(MINILM, 3, 128)


class Array(np.ndarray):
    """NumPy's array with what CuPy's has to be filled and read."""

    def set(self, values: np.ndarray) -> None:
        self[...] = values

    def get(self) -> np.ndarray:
        return np.array(self)


class Bound:
    """A bound model on the CPU."""

    def __init__(self, bound: BoundModel) -> None:
        self.inputs, self.outputs = (
            {name: array.view(Array) for name, array in arrays.items()} for arrays in (bound.inputs, bound.outputs)
        )
        self._bound = bound

    def launch(self, stream: object = None) -> None:
        self._bound.launch()


class Ours(packed_ours.OurContender):
    def round_us(self) -> float:
        begin = time.perf_counter()
        self._bound.launch()
        return (time.perf_counter() - begin) * 1e6


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(path: Path, device: str, precision: str, strict: bool, packed: bool) -> engine.Model:
        assert (device, precision, strict) == ("cuda:0", "fp16", True)
        model = engine.load(path, device="cpu", threads=1, packed=packed)
        bind = model.bind
        monkeypatch.setattr(model, "bind", lambda sizes: Bound(bind(sizes)))
        return model

    monkeypatch.setattr(packed_ours, "engine", SimpleNamespace(load=load))
    monkeypatch.setattr(packed_ours, "limit_compiler", lambda model, threads: None)
    monkeypatch.setattr(packed, "network", partial(networks.network, device="cpu", dtype=torch.float32))
    monkeypatch.setattr(preparing, "References", partial(references.References, "cpu"))
    monkeypatch.setattr(packed, "CallContender", Call)
    monkeypatch.setattr(packed, "GraphContender", Graph)
    monkeypatch.setattr(packed_ours, "OurContender", Ours)
    monkeypatch.setattr(models, "_RUN_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    of_jagged_tensors_on_a_cpu(monkeypatch)
    yield
    torch.set_grad_enabled(True)


def of_jagged_tensors_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch with CUDA asks the driver what can run; the CPU's way is only asked for contiguous heads."""
    monkeypatch.setattr(sdpa, "can_use_cudnn_attention", lambda *_, **__: False)
    monkeypatch.setattr(sdpa, "_can_use_math_sdpa_jagged", lambda *_, **__: True)


def recipe(path: Path, compile_until: float | None) -> packed.PackedRecipe:
    return packed.PackedRecipe((CASE,), path, Ceilings(1e12, 1e12), 1, compile_until)


def test_ours_is_measured_packed_and_padded_beside_all_peers(on_the_cpu: None, model_repository: Path) -> None:
    chosen = recipe(model_file(model_repository, MINILM), time.monotonic())
    found = chosen.build().measure(CASE.name)
    measurement = found.measurement
    assert measurement.failure == ""
    assert measurement.rel_err is not None and measurement.rel_err < 1e-5
    assert list(measurement.peers) == [
        said.EAGER, said.COMPILE, said.JAGGED_CALLED, said.JAGGED, said.JAGGED_COMPILE,
    ]  # fmt: skip
    assert set(measurement.reasons) == {said.COMPILE, said.JAGGED_COMPILE}
    assert all(reason.startswith("not done in time") for reason in measurement.reasons.values())
    assert measurement.parts == {}
    figures = found.figures
    assert {"mean", "max", "sequences_s", "padded_ratio", "over_lengths", "jagged_ratio"} < set(figures)
    assert 0 < figures["worst_token"] < 1e-5
    assert 0 < figures["worst_token_padded"] < 1e-5
    assert CASE.lengths.sum() <= figures["tokens"] < 3 * 128
    assert min(figures["ours_padded_us"], figures["run_padded_us"]) > 0
    assert found.run_us is not None and found.floor_us is not None
    again = chosen.plain().build().measure(CASE.name).measurement
    assert again.reasons == dict.fromkeys(
        (said.COMPILE, said.JAGGED_COMPILE), "the process that compiled it crashed, or had to be ended"
    )


def test_without_torch_compile_there_are_the_others(on_the_cpu: None, model_repository: Path) -> None:
    found = recipe(model_file(model_repository, MINILM), None).build().measure(CASE.name).measurement
    assert list(found.peers) == [said.EAGER, said.JAGGED_CALLED, said.JAGGED]
    assert found.reasons == {}


def test_a_model_without_a_packed_graph_fails_and_says_why(
    on_the_cpu: None, model_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.Model, "pack", lambda self, feeds: None)
    monkeypatch.setattr(engine.Model, "why_padded", "no attention was recognised")
    found = recipe(model_file(model_repository, MINILM), None).build().measure(CASE.name)
    assert found.measurement.failure == "not on packed tokens: no attention was recognised"
    assert (found.floor_us, set(found.figures)) == (None, {"mean", "max"})


def test_what_waits_for_the_device_is_not_captured(
    on_the_cpu: None, model_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []

    def mode(name: str) -> None:
        modes.append(name)
        if name == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    found = recipe(model_file(model_repository, MINILM), None).build().measure(CASE.name).measurement
    assert found.reasons == {said.JAGGED: "called a synchronizing CUDA operation"}
    assert modes == ["error", "default"]
    assert found.peers[said.JAGGED_CALLED] is not None


def test_the_command_measures_and_keeps_the_rows(
    on_the_cpu: None, model_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("Some GPU", "sm_90a", 132)
    run = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {}, Ceilings(1e12, 1e12))
    monkeypatch.setattr(session, "present", lambda: device)
    monkeypatch.setattr(session, "begin", lambda commit: (None, device, run))
    monkeypatch.setattr(cases, "PACKED", (CASE,))

    def here(recipes: Sequence[packed.PackedRecipe], *_: object) -> Iterator[tuple[str, packed.Outcome]]:
        for recipe in map(pickle.loads, map(pickle.dumps, recipes)):
            bench = recipe.build()
            for name in recipe.names:
                yield name, pickle.loads(pickle.dumps(bench.measure(name)))

    monkeypatch.setattr(preparing, "one_at_a_time", here)
    folders = ["--models", str(model_repository), "--results", str(tmp_path)]
    assert main(["packed", "--tune", "0", "--compile", "0", *folders]) == 0
    ((key, row),) = Results.load(tmp_path / "some-gpu.json").rows.items()
    assert key == ("packed", CASE.name)
    assert row.figures["sequences_s"] > 0 and row.run_us is not None and row.floor_us is not None
    table = regenerated("<!-- table: some-gpu packed -->\n<!-- end -->\n", tmp_path)
    assert "Not measured yet" in table, "this case is not in the committed list"


def real() -> real_tokens.Real:
    expected = np.ones((2, 3, 4))
    return real_tokens.Real.of(expected, {"attention_mask": np.array([[1, 1, 1], [1, 0, 0]])})


def test_errors_are_those_of_real_tokens() -> None:
    reference, result = real(), torch.ones(2, 3, 4)
    result[1, 1:] = torch.nan
    assert reference.of_padded(0, result) == 0
    result[1, 0, 0] = 1.2
    taken = reference.taken(result)
    assert reference.of_padded(0, result) == reference.of_tokens(0, taken) == pytest.approx(0.05)
    assert reference.worst(taken) == pytest.approx(0.1)
    result[0, 0] = torch.nan
    assert not reference.of_padded(0, result) <= 1
    assert not reference.worst(reference.taken(result)) <= 1
    assert reference.of_padded(0, torch.ones(2, 4, 4)) == reference.of_tokens(0, torch.ones(5, 4)) == float("inf")


class Stuck:
    """A bound model that gives ones at real tokens, and something at padded ones."""

    def __init__(self, padding: float) -> None:
        self.outputs = {"y": np.zeros((2, 3, 4), np.float32).view(Array)}
        self._padding = padding

    def launch(self, stream: object = None) -> None:
        self.outputs["y"][...] = np.where(real().mask[..., None], 1.0, self._padding)


@pytest.mark.parametrize(("padding", "is_packed", "error"), [(0, True, 0), (2, True, np.inf), (2, False, 0)])
def test_a_packed_run_leaves_zeros_at_padded_positions(padding: float, is_packed: bool, error: float) -> None:
    bound: Any = Stuck(padding)
    contender = packed_ours.OurContender(bound, real(), is_packed)
    assert contender.error() == error
    assert contender.worst == 0


def test_a_row_that_fails_for_one_token_keeps_its_figures(
    on_the_cpu: None, model_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter((9e-3, 4e-3))  # packed, then padded
    monkeypatch.setattr(real_tokens.Real, "worst", lambda self, result: next(errors))
    found = recipe(model_file(model_repository, MINILM), None).build().measure(CASE.name)
    assert found.measurement.failure == "relative error 9.0e-03 of a token, above 0.008"
    assert (found.measurement.ours_us, found.run_us) == (None, None)
    assert (found.figures["worst_token"], found.figures["worst_token_padded"]) == (9e-3, 4e-3)
    assert found.figures["padded_ratio"] > 0 and found.figures["ours_padded_us"] > 0


def test_one_token_too_far_off_is_a_failure() -> None:
    right = packed.Measurement(10.0, rel_err=1e-3)
    assert packed.judged(right, 4e-3, None) is right
    assert packed.judged(right, 6e-3, 3.1e-3) is right  # fp16 moves a padded one as far
    assert not packed.judged(right, float("nan"), 1e-3).ours_us
    for padded, limit in ((None, "0.005"), (1e-3, "0.005"), (2.9e-3, "0.0058"), (0.5, "0.02")):
        wrong = packed.judged(right, 3e-2, padded)
        assert (wrong.ours_us, wrong.failure) == (None, f"relative error 3.0e-02 of a token, above {limit}")


def test_bert_on_jagged_tensors_is_the_padded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    of_jagged_tensors_on_a_cpu(monkeypatch)
    shape: Mapping[str, int] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    module = BertModel(BertConfig(**shape, intermediate_size=96), add_pooling_layer=False).eval()
    feeds = CASE.feeds()
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state
        found = JaggedBert(module)(*jagged(feeds, "cpu"))
    assert found.layout is torch.jagged
    reference = real_tokens.Real.of(expected.double().numpy(), feeds)
    assert reference.of_tokens(0, found.values()) < 1e-5


@pytest.mark.slow
def test_torch_compile_takes_part_once_it_is_done(on_the_cpu: None, model_repository: Path) -> None:
    found = recipe(model_file(model_repository, MINILM), time.monotonic() + 600).build().measure(CASE.name).measurement
    assert found.reasons == {}
    assert all(us is not None for us in found.peers.values())
