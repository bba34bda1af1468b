"""The ceilings of the CPU: plausible, and kept only where the machine had time for measuring them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import engine
from engine.specs import DeviceInfo, roofline
from engine.targets.cpu import ceilings as module
from engine.targets.cpu import system, target
from engine.targets.cpu.ceilings import Ceilings, ceilings
from engine.targets.cpu.codegen.isa import host_isa

CALM = Ceilings(flops=2e11, bytes=2e10, cached_bytes=2e11, load=0.2, spread=0.02)
BUSY = (replace(CALM, flops=1e11, load=3.0), replace(CALM, bytes=1e10, spread=0.5))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Ceilings]:
    """What the next measurements find; the cache is empty."""
    found: list[Ceilings] = []
    monkeypatch.setenv("TILEWAVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_best", {})
    monkeypatch.setattr(module, "_measure", lambda *_: found.pop(0))
    return found


def restart() -> None:
    module._best.clear()


def test_they_are_plausible() -> None:
    found = module._measure(host_isa(), 1)
    assert 1e9 < found.flops < 1e13
    assert 1e9 < found.bytes < 1e12
    assert found.bytes < found.cached_bytes < 1e13
    assert found.load >= 0 and found.spread >= 0


def test_what_a_calm_machine_shows_is_measured_once(measured: list[Ceilings], tmp_path: Path) -> None:
    measured.append(CALM)
    assert ceilings(host_isa(), 2) == ceilings(host_isa(), 2) == CALM
    restart()
    assert ceilings(host_isa(), 2) == CALM and not measured
    (file,) = tmp_path.rglob("ceilings-*.json")
    assert json.loads(file.read_text())["load"] == CALM.load


@pytest.mark.parametrize("busy", BUSY, ids=["load", "spread"])
def test_what_a_busy_machine_shows_is_kept_nowhere_and_never_lowers_what_is_known(
    measured: list[Ceilings], tmp_path: Path, busy: Ceilings
) -> None:
    lower = replace(busy, flops=busy.flops / 2, cached_bytes=busy.cached_bytes * 1.5)
    measured += [busy, lower, CALM]
    assert ceilings(host_isa(), 2) == busy
    second = ceilings(host_isa(), 2)
    assert (second.flops, second.cached_bytes) == (busy.flops, lower.cached_bytes)
    assert not list(tmp_path.rglob("*.json"))
    third = ceilings(host_isa(), 2)
    assert (third.flops, third.bytes, third.cached_bytes) == (CALM.flops, CALM.bytes, lower.cached_bytes)
    restart()
    assert ceilings(host_isa(), 2) == third


@pytest.mark.parametrize("content", ["", "[]", '{"flops": 1e11, "bytes": 1e10}', json.dumps(vars(BUSY[0]))])
def test_a_file_that_says_less_or_of_a_busy_machine_is_none(
    measured: list[Ceilings], tmp_path: Path, content: str
) -> None:
    measured += [CALM, replace(CALM, flops=3e11)]
    ceilings(host_isa(), 2)
    (file,) = tmp_path.rglob("ceilings-*.json")
    file.write_text(content)
    restart()
    assert ceilings(host_isa(), 2).flops == 3e11


def test_the_roofline_holds_cached_bytes_against_the_cache() -> None:
    device = DeviceInfo("cpu", "c", "x", 2, peak_flops=1e9, peak_bytes=1e8, cache_bytes=1 << 20, peak_cache_bytes=4e8)
    assert roofline(0, 3e5, 3e5, 1e-3, device) == pytest.approx(0.75)
    assert roofline(0, 5e4, 0, 1e-3, device) == pytest.approx(0.5)
    assert roofline(0, 3e5, 2e5, 2e-3, device) == pytest.approx(0.5 + 0.25)
    assert roofline(9e5, 3e5, 3e5, 1e-3, device) == pytest.approx(0.9)
    assert roofline(1, 1, 0, 0.0, device) == 0


def test_rows_and_totals_say_what_the_cache_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "t = Exp(x) s = ReduceSum <keepdims=0> (t, axes) y = Relu(s)"
    graph = onnx.parser.parse_graph(f"g (float[n,64] x) => (float[n] y) <int64[1] axes = {{1}}> {{ {body} }}")
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    monkeypatch.setattr(target, "cache_bytes", lambda threads: 1 << 12)
    with engine.load(proto.SerializeToString(), device="cpu", threads=1) as model:
        few = model.profile({"x": np.ones((2, 64), np.float32)}, runs=2)
        assert [row.cached_bytes for row in few] == [row.bytes for row in few]
        many = model.profile({"x": np.ones((1000, 64), np.float32)}, runs=2)
        assert all(row.cached_bytes < row.bytes for row in many if row.bytes > 1 << 13)
        totals = model.kernel_stats()
        assert 0 < sum(stat.cached_bytes for stat in totals) < sum(stat.bytes for stat in totals)


def test_caches_are_counted_once_for_those_that_share_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        caches = [
            ("1", "Data", "32K", str(number)),
            ("1", "Instruction", "64K", str(number)),
            ("3", "Unified", "8M", shared),
        ]
        for i, values in enumerate(caches):
            folder = tmp_path / f"cpu{number}" / "cache" / f"index{i}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                (folder / name).write_text(value + "\n")
    monkeypatch.setattr(system, "_PROCESSORS", tmp_path)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert [system.cache_bytes(threads) for threads in (1, 2, 4)] == [8 << 20, 16 << 20, 16 << 20]
    monkeypatch.setattr(system, "_PROCESSORS", tmp_path / "nothing")
    assert system.cache_bytes(4) == 0
