"""What the kernel metrics cost and tell: pairs, ncu's CSV and what is made of both. Needs the CUDA packages, no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from typing import cast

import pytest

pytest.importorskip("cupy")

from benchmarks import tables
from benchmarks.__main__ import main
from benchmarks.cases import METRICS
from benchmarks.cases.metrics import MetricsCase
from benchmarks.cases.models import ModelCase
from benchmarks.gpu import metrics, ncu, overhead
from benchmarks.measure import Measurement
from benchmarks.recorder import Recorder
from benchmarks.results import Device, Results, Run
from tests.engine.targets.cuda.fake_cupy import fake_gpu
from tests.engine.targets.cuda.test_runtime import Feeds, feeds, load, target_of

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def line(number: int, grid: str, block: str, unit: str, value: str, metric: str = ncu.METRIC) -> str:
    return (
        f'"{number}","4242","python3.11","127.0.0.1","kernel","1","13","{block}","{grid}","0","9.0",'
        f'"Command line profiler metrics","{metric}","{unit}","{value}"'
    )


CSV = "\n".join(
    [
        "==PROF== Connected to process 4242 (/usr/bin/python3.11)",
        '==PROF== Profiling "kernel" - 0: 0%....50%....100% - 1 pass',
        "==PROF== Disconnected from process 4242",
        HEAD,
        line(0, "(132, 1, 1)", "(384, 1, 1)", "nsecond", "12,512"),
        line(0, "(132, 1, 1)", "(384, 1, 1)", "block", "132", "launch__grid_size"),
        line(1, "(8, 4, 2)", "(128, 1, 1)", "ns", "4000"),
        line(2, "(1, 1, 1)", "(32, 1, 1)", "us", "1.5"),
        "",
    ]
)
SHAPES: list[list[ncu.Shape]] = [[((132, 1, 1), 384)], [], [((8, 4, 2), 128), ((1, 1, 1), 32)]]


def test_the_csv_of_ncu_is_read_in_the_order_of_the_launches() -> None:
    timed = ncu.parse(CSV)
    assert [one.us for one in timed] == pytest.approx([12.512, 4.0, 1.5])
    assert [one.shape for one in timed] == [shape for step in SHAPES for shape in step]
    assert ncu.matched(SHAPES, timed) == [[pytest.approx(12.512)], [], [4.0, 1.5]]


@pytest.mark.parametrize("text", ["==PROF== Connected\n==WARNING== No kernels were profiled.\n", ""])
def test_no_kernel_in_the_csv_is_said(text: str) -> None:
    with pytest.raises(ncu.NcuError, match="no kernel"):
        ncu.parse(text)


@pytest.mark.parametrize("found", ["furlong", ""])
def test_a_csv_of_another_kind_is_said(found: str) -> None:
    with pytest.raises(ncu.NcuError, match="not what is known"):
        ncu.parse(CSV.replace("nsecond", found))


def test_other_launches_than_the_plan_has_are_refused() -> None:
    timed = ncu.parse(CSV)
    with pytest.raises(ncu.NcuError, match="2 kernels were profiled, 3"):
        ncu.matched(SHAPES, timed[:2])
    with pytest.raises(ncu.NcuError, match="kernel 1 has"):
        ncu.matched(SHAPES, [timed[0], timed[2], timed[1]])


def test_bands_are_those_of_ncus_times_and_of_steps_of_one_kernel() -> None:
    stamps, times = [10.5, 19.0, 4.4, 2.0, 99.0], [[10.0], [20.0], [4.0], [1.0], [40.0, 40.0]]
    large, small = ncu.bands(stamps, times)
    assert (large.name, large.kernels, large.bound) == ("over 10 µs", 2, 0.05)
    assert large.worst == pytest.approx(0.05) or large.worst == pytest.approx(-0.05)
    assert large.median == pytest.approx(0.0)
    assert (small.name, small.kernels) == ("3 to 10 µs", 1)
    assert small.worst == pytest.approx(0.1)


@pytest.fixture
def profiler(tmp_path: Path) -> Callable[[str], str]:
    """Makes an ncu that notes its arguments and runs `body` with the path of the log."""

    def made(body: str) -> str:
        path = tmp_path / "ncu"
        text = f"""#!{sys.executable}
import sys
from pathlib import Path
Path({str(tmp_path / "arguments")!r}).write_text("\\n".join(sys.argv[1:]))
log = Path(sys.argv[sys.argv.index("--log-file") + 1])
{body}
"""
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return made


def test_ncu_leaves_clocks_and_caches_alone(profiler: Callable[[str], str], tmp_path: Path) -> None:
    tool = profiler(f"log.write_text({CSV!r})")
    assert len(ncu.profile(tool, ["program", "argument"])) == 3
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[-2:] == ["program", "argument"]
    for option, value in (("--clock-control", "none"), ("--cache-control", "none"), ("--profile-from-start", "off")):
        assert given[given.index(option) + 1] == value


def test_what_ncu_says_is_the_reason(profiler: Callable[[str], str]) -> None:
    tool = profiler("log.write_text('==ERROR== ERR_NVGPUCTRPERM - no permission\\n'); sys.exit(1)")
    with pytest.raises(ncu.NcuError, match="ERR_NVGPUCTRPERM"):
        ncu.profile(tool, ["program"])


def test_the_programs_own_failure_is_the_reason(profiler: Callable[[str], str]) -> None:
    tool = profiler("print('FileNotFoundError: model.onnx', file=sys.stderr); sys.exit(3)")
    with pytest.raises(ncu.NcuError, match="FileNotFoundError"):
        ncu.profile(tool, ["program"])


def test_without_ncu_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--ncu", "no-such-ncu"]) == 1
    assert "no no-such-ncu: install Nsight Compute" in capsys.readouterr().err


# Overhead


def test_the_ratio_is_the_mean_of_pairs_with_its_interval() -> None:
    even = overhead.ratio_of([(1.01, 1.0)] * overhead.PAIRS)
    assert even.low == pytest.approx(even.mean) == pytest.approx(even.high) == pytest.approx(1 / 1.01)
    pairs = [(1.0, 0.98), (1.0, 1.02)] * (overhead.PAIRS // 2)
    mixed = overhead.ratio_of(pairs)
    assert mixed.mean == pytest.approx(exp((log(0.98) + log(1.02)) / 2))
    assert 0.98 < mixed.low < mixed.mean < mixed.high < 1.02
    with pytest.raises(ValueError, match="12 pairs"):
        overhead.ratio_of(pairs[:3])


def test_sides_take_turns_and_stamps_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stamped, sides = [0.0], [True], list[tuple[bool, int]]()

    def stamp(on: bool) -> None:
        stamped[0] = on

    def run(runs: int) -> None:
        sides.append((stamped[0], runs))
        clock[0] += runs * (1.02e-3 if stamped[0] else 1e-3)

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    found = overhead.measure(run, stamp, 16)
    assert found.us == pytest.approx(1000)
    assert found.ratio.mean == pytest.approx(1 / 1.02)
    assert stamped[0]
    paired = sides[2:]
    assert len(paired) == 2 * overhead.PAIRS
    assert [on for on, _ in paired[:4]] == [False, True, True, False]
    assert {runs for _, runs in paired} == {112}, "0.1 s, and a multiple of what one sample stands for"


@dataclass(frozen=True)
class SmallCase:
    """The model of the runtime's tests, as a case."""

    model: str = "small"
    name: str = "small n=2 t=3"
    sizes: Mapping[str, int] = field(default_factory=lambda: {"n": 2, "t": 3})

    def feeds(self) -> Feeds:
        return feeds(2, 3)


def test_a_model_is_measured_with_stamps_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is a fake, whose kernels write stamps."""
    monkeypatch.setattr(overhead, "_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "_SAMPLES", 2)
    with fake_gpu(monkeypatch) as gpu:
        gpu.pause = 0.0
        monkeypatch.setattr(metrics, "cupy", gpu.namespace())
        model = load()
        target, case = target_of(model), MetricsCase(cast(ModelCase, SmallCase()))
        overlap = target.overlap
        found = metrics._measure(model, case)
        assert (target.sample_every, target.overlap) == (16, overlap)
        steps = model.plan(case.of.sizes).steps
        model.close()
    assert len(found.stamps_us) == len(found.shapes) == len(steps)
    assert all(len(row) == 1 for row in found.shapes)
    assert found.figures["stamps_us"] == pytest.approx(sum(found.stamps_us)) and all(us > 0 for us in found.stamps_us)
    assert {name for name in found.figures if not name.startswith(("launch", "run"))} == {
        "graph_us", "serial_us", "stamps_us",
    }  # fmt: skip
    assert all(found.figures[name] > 0 for name in ("launch_low", "run_low", "run_us", "graph_us", "serial_us"))


# What is made of both

FIGURES = {
    "launch_ratio": 0.995, "launch_low": 0.993, "launch_high": 0.997, "run_ratio": 1.0, "run_low": 0.99,
    "run_high": 1.01, "run_us": 30.0, "graph_us": 15.0, "serial_us": 19.0, "stamps_us": 16.0,
}  # fmt: skip


def test_cases_share_what_ncu_saw_in_their_order() -> None:
    one = metrics._Measured(FIGURES, [12.4], SHAPES[:1])
    other = metrics._Measured(FIGURES, [0.0, 5.4], SHAPES[1:])
    first, second = metrics.beside_ncu({METRICS[0]: one, METRICS[1]: other}, ncu.parse(CSV))
    assert (first[0], second[0]) == METRICS[:2]
    assert first[1].figures["ncu_us"] == pytest.approx(12.512)
    assert first[1].figures["over 10 µs kernels"] == 1 and not first[1].failure
    assert second[1].figures["ncu_us"] == pytest.approx(5.5)
    assert second[1].figures["overlap_us"] == pytest.approx(5.5 - 15)
    assert not any("kernels" in name for name in second[1].figures), "a step of two kernels is in no band"


def test_what_is_beyond_its_bound_fails() -> None:
    slow = metrics.judged({**FIGURES, "run_ratio": 0.98}, [], {})
    assert slow.failure == "run: 0.9800 of the throughput without stamps, below 0.99"
    band = ncu.Band("over 10 µs", 3, 0.01, -0.07, 0.05)
    assert metrics.judged(FIGURES, [band], {}).failure == "over 10 µs: -7.0% from ncu, beyond 5%"
    assert not metrics.judged(FIGURES, [], {}).failure


def test_rows_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device("Some GPU", "sm_90a", 132)
    recorder = Recorder(device, Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {}, None), tmp_path)
    band = ncu.Band("over 10 µs", 3, 0.011, -0.07, 0.05)
    measured = metrics.judged({**FIGURES, "ncu_us": 17.0, "overlap_us": 2.0}, [band], {})
    recorder.add(METRICS[0], Measurement(failure=measured.failure), "hash", figures=measured.figures)
    without = metrics.judged(FIGURES, [], {"ncu": "not asked"})
    recorder.add(METRICS[1], Measurement(reasons=without.reasons), "hash", figures=without.figures)
    assert recorder.end(2) == 1
    assert "FAILED over 10 µs" in capsys.readouterr().out
    results = Results.load(tmp_path / f"{device.stem}.json")
    rendered = tables.render(results, tables.suite_rows(results, device.stem, "metrics")).splitlines()
    assert rendered[2] == (
        "| resnet50 batch=1 **failed** | 0.9950 (0.9930–0.9970) | 1.0000 (0.9900–1.0100) | 15 | 19 | 16 | 17 | 2 "
        "| +1.1%, -7.0% (3) | – |"
    )
    assert rendered[3].endswith("| 15 | 19 | 16 | – | – | – | – |")
