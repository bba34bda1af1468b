"""What the kernel metrics cost and tell: ncu's CSV, stamps of the same launches, and the row. Needs the CUDA packages,
no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

pytest.importorskip("cupy")

from benchmarks import rendering, tables
from benchmarks.__main__ import main
from benchmarks.cases import METRICS
from benchmarks.cases.metrics import MetricsCase
from benchmarks.cases.models import ModelCase
from benchmarks.gpu import deviation, empty_kernels, metrics, ncu, overhead, profiled, windows
from benchmarks.gpu.deviation import Band, Deviation
from benchmarks.gpu.windows import Launched, Window
from benchmarks.measure import Measurement
from benchmarks.recorder import Recorder
from benchmarks.results import Device, Results, Run
from engine.targets.cuda.program import SAMPLE_SECONDS
from engine.targets.cuda.sampled_times import MOST_RUNS
from tests.engine.targets.cuda.fake_cupy import FakeGpu, fake_gpu
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


def test_a_kernel_that_ran_more_than_once_is_refused(profiler: Callable[[str], str]) -> None:
    text = CSV.replace("- 1 pass", "- 12 passes")
    with pytest.raises(ncu.NcuError, match="12 times"):
        ncu.profile(profiler(f"log.write_text({text!r})"), ["program"])


def test_the_programs_own_failure_is_the_reason(profiler: Callable[[str], str]) -> None:
    tool = profiler("print('FileNotFoundError: model.onnx', file=sys.stderr); sys.exit(3)")
    with pytest.raises(ncu.NcuError, match="FileNotFoundError"):
        ncu.profile(tool, ["program"])


def test_without_ncu_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--ncu", "no-such-ncu"]) == 1
    assert "no no-such-ncu: install Nsight Compute" in capsys.readouterr().err


# On a GPU that is a fake, whose kernels write stamps


@dataclass(frozen=True, eq=False)
class SmallCase:
    """The model of the runtime's tests, as a case."""

    model: str = "small"
    name: str = "small n=2 t=3"
    sizes: Mapping[str, int] = field(default_factory=lambda: {"n": 2, "t": 3})

    def feeds(self) -> Feeds:
        return feeds(2, 3)


CASE = MetricsCase(cast(ModelCase, SmallCase()))
QUICK = overhead.Effort(within=1.0, seconds=0.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        made.pause = 0.0
        made.only_stamp.add(empty_kernels.SOURCE)
        for module in (metrics, profiled, empty_kernels):
            monkeypatch.setattr(module, "cupy", made.namespace())
        yield made


def test_a_model_is_measured_with_stamps_and_without(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "SIDE_SECONDS", 0.0)
    monkeypatch.setattr(overhead, "_WINDOW_RUNS", 4)
    monkeypatch.setattr(overhead, "LEAST_FOURS", 4)
    monkeypatch.setattr(metrics, "_ASIDE_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "_SAMPLES", 2)
    for effort in ("_LAUNCH", "_ASIDE", "_RUN"):
        monkeypatch.setattr(metrics, effort, QUICK)
    model = load()
    target = target_of(model)
    overlap = target.overlap
    figures = metrics._measure(model, CASE)
    assert (target.sample_every, target.sample_seconds, target.overlap) == (16, SAMPLE_SECONDS, overlap)
    model.close()
    assert all(figures[f"{what}_{part}"] > 0 for what in ("launch", "each", "run") for part in ("ratio", "low", "high"))
    assert all(figures[f"{what}_us"] > 0 for what in ("run", "graph", "serial", "stamps"))
    assert figures["overlap_us"] == pytest.approx(figures["serial_us"] - figures["graph_us"])
    assert 16 <= figures["launch_one_in"] <= MOST_RUNS
    assert figures.keys() == FIGURES.keys()


LAUNCH_US = 2.0
"""By which the fake's profiler exceeds a stamp."""


def test_stamps_and_profiled_times_are_of_the_same_launches(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the profiled process to the row: what is beside a stamp is the time of that very launch."""
    model = load()
    plan = model.plan(CASE.of.sizes)
    monkeypatch.setattr(profiled.engine, "load", lambda *arguments, **options: model)
    monkeypatch.setattr(profiled, "METRICS", (CASE,))
    profiled.main("small.onnx", str(tmp_path / "windows.json"), [CASE.name])
    assert not gpu.profiling
    launched = windows.read(tmp_path / "windows.json")
    csv = "\n".join(
        [
            HEAD,
            *(
                line(i, str(one.grid), f"({one.threads}, 1, 1)", "ns", f"{one.nanoseconds + LAUNCH_US * 1e3:,.0f}")
                for i, one in enumerate(gpu.profiled)
            ),
        ]
    )
    found = deviation.paired(launched, ncu.parse(csv))
    steps = [(step, times) for window in found[CASE.name] for step, times in window]
    assert len(steps) == profiled.REPETITIONS * len(plan.steps)
    assert all(times == [pytest.approx(step.stamp_us + LAUNCH_US)] for step, times in steps)
    offset = deviation.offset(found[windows.EMPTY])
    assert offset.us == pytest.approx(LAUNCH_US)
    assert offset.of_shapes.keys() == {"1x32", "1x384+227K", "1x128", "8x256", "1x1024"}, "of one multiprocessor"
    ((case, outcome),) = metrics.beside_ncu({CASE: FIGURES}, launched, ncu.parse(csv))
    assert case is CASE and not outcome.failure
    assert [one.judged for one in outcome.kernels] == [pytest.approx(0.0, abs=1e-9)] * len(plan.steps)
    assert all(one.raw < 0 for one in outcome.kernels)
    assert outcome.figures["ncu_us"] - outcome.figures["ncu_stamps_us"] == pytest.approx(LAUNCH_US * len(plan.steps))
    metrics.write_kernels(tmp_path / "each.csv", [(case, outcome)])
    written = (tmp_path / "each.csv").read_text().splitlines()
    assert len(written) == 1 + len(plan.steps) and written[1].startswith("small n=2 t=3,")


# What is made of both


def step(stamp_us: float, *shapes: ncu.Shape, name: str = "step") -> Launched:
    return Launched(name, shapes, stamp_us)


def test_one_launch_that_was_disturbed_decides_nothing() -> None:
    shape = SHAPES[0][0]
    times = [(10.0, 12.0), (10.2, 12.2), (10.1, 900.0), (99.0, 12.1), (10.0, 12.1)]
    (one,) = deviation.deviations([[(step(stamp, shape), [us])] for stamp, us in times], 2.0)
    assert (one.stamp_us, one.ncu_us) == (10.1, 12.1)
    assert one.judged == pytest.approx(0.0) and one.raw == pytest.approx(10.0 / 12.0 - 1)


def test_bands_are_those_of_ncus_times_and_of_steps_of_one_kernel() -> None:
    shape = SHAPES[0][0]
    pairs: list[deviation.Pair] = [
        (step(8.5, shape, name="a"), [10.0]), (step(17.6, shape, name="b"), [20.0]), (step(2.9, shape), [4.0]),
        (step(0.5, shape), [1.0]), (step(99.0, shape, shape), [40.0, 40.0]),
    ]  # fmt: skip
    large, small = deviation.bands(list(deviation.deviations([pairs], 1.5)))
    assert (large.name, large.kernels, large.bound, large.beyond) == ("over 10 µs", 2, 0.05, 0)
    assert (large.worst.name, large.worst.judged, large.median) == ("b", pytest.approx(-0.045), pytest.approx(-0.0225))
    assert large.raw_median == pytest.approx(-0.135)
    assert (small.name, small.kernels, small.beyond) == ("3 to 10 µs", 1, 0)
    assert small.worst.judged == pytest.approx(0.1)
    assert deviation.sums_us([pairs]) == (pytest.approx(8.5 + 17.6 + 2.9 + 0.5 + 99.0), pytest.approx(115.0))


FIGURES = {
    "launch_ratio": 0.995, "launch_low": 0.993, "launch_high": 0.997, "launch_one_in": 68.0, "each_ratio": 0.95,
    "each_low": 0.94, "each_high": 0.96, "run_ratio": 1.0, "run_low": 0.99, "run_high": 1.01, "run_us": 30.0,
    "graph_us": 15.0, "serial_us": 19.0, "overlap_us": 4.0, "stamps_us": 16.0,
}  # fmt: skip


def test_cases_share_what_ncu_saw_in_their_order() -> None:
    empty = Window(windows.EMPTY, (step(0.1, SHAPES[2][1]),))
    launched = [
        Window(METRICS[0].name, (step(10.5, *SHAPES[0]),)), empty,
        Window(METRICS[1].name, (step(0.0), step(5.4, *SHAPES[2]))), empty,
    ]  # fmt: skip
    timed = ncu.parse(CSV)
    timed = [timed[0], timed[2], timed[1], timed[2], timed[2]]
    first, second = metrics.beside_ncu({METRICS[0]: FIGURES, METRICS[1]: FIGURES}, launched, timed)
    assert (first[0], second[0]) == METRICS[:2]
    assert first[1].figures["ncu_us"] == pytest.approx(12.512)
    assert first[1].figures["offset_us"] == pytest.approx(1.4)
    assert first[1].figures["over 10 µs median"] == pytest.approx((10.5 + 1.4) / 12.512 - 1)
    assert first[1].figures["over 10 µs kernels"] == 1 and not first[1].failure
    assert (second[1].figures["ncu_us"], second[1].figures["ncu_stamps_us"]) == (pytest.approx(5.5), 5.4)
    assert not any("kernels" in name for name in second[1].figures), "a step of two kernels is in no band"
    with pytest.raises(ncu.NcuError, match=r"nothing of bert_base batch=1 .* was profiled"):
        list(metrics.beside_ncu({METRICS[2]: FIGURES}, launched, timed))
    with pytest.raises(ncu.NcuError, match="only write their stamp"):
        list(metrics.beside_ncu({METRICS[0]: FIGURES}, launched[:1], timed[:1]))


WORST = Deviation("conv, gemm", 10.0, 12.9, -0.07, -0.22)


def test_what_is_beyond_its_bound_fails() -> None:
    slow = metrics.judged({**FIGURES, "run_ratio": 0.98}, [], {})
    assert slow.failure == "run: 0.9800 of the throughput without stamps, below 0.99"
    band = Band("over 10 µs", 3, 0.01, -0.2, WORST, 1, 0.05)
    assert metrics.judged(FIGURES, [band], {}).failure == (
        "over 10 µs: 1 of 3 beyond 5% from ncu, at worst -7.0% (conv, gemm: stamp 10.00, ncu 12.90 µs)"
    )
    assert not metrics.judged(FIGURES, [replace(band, beyond=0)], {}).failure
    assert not metrics.judged({**FIGURES, "each_ratio": 0.5}, [], {}).failure, "no server stamps every run"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_measure", lambda model, case: FIGURES)
    monkeypatch.setattr(metrics.engine, "load", lambda *arguments, **options: nullcontext())


def test_what_the_profiled_process_left_is_read(measured: None, profiler: Callable[[str], str], tmp_path: Path) -> None:
    text = CSV.replace(line(2, "(1, 1, 1)", "(32, 1, 1)", "us", "1.5"), "")
    launched = [Window(METRICS[0].name, (step(11.2, *SHAPES[0]),)), Window(windows.EMPTY, (step(2.8, SHAPES[2][0]),))]
    windows.write(tmp_path / "left.json", launched)
    tool = profiler(
        f"log.write_text({text!r})\nPath(sys.argv[-2]).write_text(Path({str(tmp_path / 'left.json')!r}).read_text())"
    )
    ((case, outcome),) = metrics.measure_all(METRICS[:1], {METRICS[0].of.model: tmp_path}, tool, float("inf"))
    assert case is METRICS[0] and outcome.figures["offset_us"] == pytest.approx(1.2)
    assert outcome.figures["over 10 µs worst"] == pytest.approx(12.4 / 12.512 - 1) and not outcome.failure
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[-5:-2] == ["-m", "benchmarks.gpu.profiled", str(tmp_path)] and given[-1] == METRICS[0].name


def test_without_ncus_times_the_rest_is_still_a_row(
    measured: None, profiler: Callable[[str], str], tmp_path: Path
) -> None:
    files = {METRICS[0].of.model: tmp_path}
    ((_, outcome),) = metrics.measure_all(METRICS[:1], files, profiler(f"log.write_text({CSV!r})"), float("inf"))
    assert outcome.failure.startswith("ncu: the profiled process left no stamps") and outcome.figures == FIGURES
    ((_, outcome),) = metrics.measure_all(METRICS[:1], files, None, float("inf"))
    assert outcome == metrics.Outcome(FIGURES, "", {"ncu": "not asked"})


def test_rows_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device("Some GPU", "sm_90a", 132)
    recorder = Recorder(device, Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {}, None), tmp_path)
    band = Band("over 10 µs", 3, 0.011, -0.204, WORST, 1, 0.05)
    beside = {
        "ncu_stamps_us": 14.0,
        "ncu_us": 17.0,
        "offset_us": 2.05,
        "offset 1x32 us": 1.9,
        "offset 132x384+227K us": 2.3,
    }
    found = metrics.judged({**FIGURES, **beside}, [band], {})
    recorder.add(METRICS[0], Measurement(failure=found.failure), "hash", figures=found.figures)
    without = metrics.judged(FIGURES, [], {"ncu": "not asked"})
    recorder.add(METRICS[1], Measurement(reasons=without.reasons), "hash", figures=without.figures)
    assert recorder.end(2) == 1
    assert "FAILED over 10 µs" in capsys.readouterr().out
    results = Results.load(tmp_path / f"{device.stem}.json")
    rendered = rendering.render(results, tables.suite_rows(results, device.stem, "metrics")).splitlines()
    assert rendered[2] == (
        "| resnet50 batch=1 **failed** | 0.9950 (0.9930–0.9970) | 68 | 0.9500 (0.9400–0.9600) | 1.0000 (0.9900–1.0100) "
        "| 15 | 16 | 19 | 4 | 14 | 17 | 2.05 (1.90–2.30) | +1.1%, -7.0% (3, 1 beyond); -20.4% | – |"
    )
    assert rendered[3].endswith("| 15 | 16 | 19 | 4 | – | – | – | – | – |")
