"""The capacity report: saturation is found, time is accounted for, and what is written is what was seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from axe_playwright_python.sync_playwright import Axe

from load_tests.browser import CHROMIUM, chromium
from load_tests.capacity.charts import Line, Mark, line_chart, stacked_bars
from load_tests.capacity.document import Heading, Paragraph, Table, write
from load_tests.capacity.report import Scenario, blocks
from load_tests.capacity.saturation import Stage, is_saturated, percentile, saturation_point, sum_failures
from load_tests.capacity.scrape import Ceilings, KernelTime, Split, parse, split
from tests.service.conftest import Starter, common_models

CEILINGS = Ceilings("A CPU", flops=1e11, memory=1e10, cache=1e11)
KERNEL = KernelTime("m", "conv", "Conv", launches=50, seconds=2.0, flops=1e11, bytes=1e10, cached_bytes=0)
SPLIT = Split(
    wall=4.0, requests=100, queue=1.0, preprocess=0.5, compute=2.0, rest=0.5, batches=50, rows=100, tokens=900,
    padding=100, server_cpu=6.0, kernels=(KERNEL,),
)  # fmt: skip


def stage(users: int, rate: float, latency: float = 0.01, failures: Mapping[str, int] | None = None) -> Stage:
    """`rate` answers a second for four seconds, evenly, all with one latency."""
    count = int(rate * 4)
    timeline = [(i / rate, latency) for i in range(count)]
    return Stage(users, 4.0, [latency] * count, 8, failures or {}, 2.0, SPLIT, timeline)


def test_the_saturation_point_is_the_fewest_users_with_nearly_all_there_is() -> None:
    ramp = [stage(users, rate) for users, rate in ((4, 50), (8, 90), (16, 120), (32, 124), (64, 122))]
    assert not is_saturated(ramp[:3])
    assert not is_saturated(ramp[:4])
    assert is_saturated(ramp)
    assert saturation_point(ramp).users == 16
    assert saturation_point(ramp[:2]).users == 8


def test_growth_after_a_dip_is_no_saturation() -> None:
    assert not is_saturated([stage(users, rate) for users, rate in ((16, 50), (32, 40), (64, 100))])
    assert not is_saturated([stage(32, 50), stage(64, 50)])


def test_a_few_users_that_get_the_same_are_no_saturation() -> None:
    """Batches are not full yet: 16 of them got a quarter more from a server that gave 1, 2 and 4 the same."""
    ramp = [stage(users, rate) for users, rate in ((1, 140), (2, 141), (4, 142), (8, 160), (16, 180), (32, 184))]
    assert not any(is_saturated(ramp[:count]) for count in range(1, len(ramp)))
    assert not is_saturated(ramp)
    assert is_saturated([*ramp, stage(64, 185)])


def test_percentiles_are_by_the_nearest_rank() -> None:
    ordered = [float(i) for i in range(1, 101)]
    assert [percentile(ordered, percent) for percent in (1, 50, 99, 99.5, 100)] == [1, 50, 99, 100, 100]
    assert percentile([7.0], 50) == 7
    assert percentile([], 50) != percentile([], 50)


def test_failures_of_all_stages_are_counted_together() -> None:
    total = sum_failures([stage(1, 10, failures={"a": 2}), stage(2, 10, failures={"a": 1, "b": 5})])
    assert total.most_common() == [("b", 5), ("a", 3)]


def test_a_split_is_the_difference_of_two_scrapes() -> None:
    def text(n: int) -> str:
        samples = {
            'inference_request_duration_seconds_sum{model="m",version="1"}': 2.0 * n,
            'inference_queue_duration_seconds_sum{model="m",version="1"}': 0.5 * n,
            'inference_preprocess_duration_seconds_sum{model="m",version="1"}': 0.25 * n,
            'inference_compute_duration_seconds_sum{model="m",version="1"}': 1.0 * n,
            'inference_compute_duration_seconds_count{model="m",version="1"}': 10 * n,
            'inference_batch_size_sum{model="m",version="1"}': 10 * n,
            'inference_batch_size_count{model="m",version="1"}': 5 * n,
            "process_cpu_seconds_total": 3.0 * n,
        }
        for version in (1, 2):
            labels = f'{{kernel="conv",model="m",op="Conv",version="{version}"}}'
            fields = {"launches": 4, "seconds": 0.25, "flops": 1e9, "bytes": 1e8, "cached_bytes": 1e7}
            for field, value in fields.items():
                samples[f"engine_kernel_{field}_total{labels}"] = value * n
        samples['engine_kernel_seconds_total{kernel="idle",model="m",op="Pad",version="1"}'] = 1.0
        return "".join(f"{name} {value}\n" for name, value in samples.items())

    found = split(parse(text(3)), parse(text(5)), wall=4.0)
    assert (found.requests, found.queue, found.preprocess, found.compute, found.rest) == (20, 1.0, 0.5, 2.0, 0.5)
    assert (found.batches, found.rows, found.server_cpu) == (10, 20, 6.0)
    assert found.kernels == (KernelTime("m", "conv", "Conv", 16, 1.0, 4e9, 4e8, 4e7),)
    assert found.kernel_seconds == 1.0


def test_the_roofline_of_a_kernel_takes_the_nearer_ceiling() -> None:
    assert KERNEL.roofline(CEILINGS) == pytest.approx(0.5)
    slow = KernelTime("m", "copy", "Pad", 1, 1.0, 0, 5e9, 2.5e9)
    assert slow.roofline(CEILINGS) == pytest.approx(0.25 + 0.025)


def test_a_scrape_of_a_real_server_is_accounted_for(starter: Starter, tmp_path: Path) -> None:
    server = starter(common_models(tmp_path / "models"))
    before = parse(server.client.get("/metrics").text)
    for _ in range(5):
        assert server.identity([1.0] * 8).status_code == 200
    found = split(before, parse(server.client.get("/metrics").text), wall=1.0)
    assert found.requests == 5 and found.rows == 10
    assert found.compute > 0 and found.rest >= 0
    assert {kernel.model for kernel in found.kernels} == {"identity"}
    assert sum(kernel.launches for kernel in found.kernels) == 10


@pytest.fixture
def starter() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.stop()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    stages = [stage(8, 50), stage(16, 90), stage(32, 91, 0.03, {"wrong <label>": 3}), stage(64, 90)]
    ramp = Scenario("images", "Photos.", stages)
    burst = Scenario("burst", "All at once.", [stage(2, 50), stage(32, 80, 0.4), stage(2, 50, 0.05)], is_burst=True)
    write(blocks("Title", ["A fact about `make load`."], [ramp, burst], {"m": CEILINGS}), tmp_path)
    return tmp_path


def test_the_report_names_the_saturation_point(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "**Saturated at 16 users**: 90.0 requests/s with 16 users, p50 10.0 ms, p99 10.0 ms" in text
    assert "| images | 16 users | 90.0 | 10.0 ms | 10.0 ms | 10.0 ms |" in text
    assert "| 16 | 10.00 ms | 5.00 ms | 20.00 ms | 5.00 ms | 2.00 | 10% | 50% of the time |" in text
    assert "| conv | Conv | m | 12.5 | 100% | 50 G | 5 G | 50% |" in text
    assert "**Failed 3 times:** wrong <label>" in text
    assert "Answers are **not as fast as before** (at most twice that p99) within 4 s." in text


def test_the_report_says_when_a_burst_is_over(tmp_path: Path) -> None:
    after = replace(stage(2, 50), timeline=[(0.5, 0.3), (1.25, 0.03), (1.5, 0.02), (2.0, 0.01)])
    burst = Scenario("burst", "All at once.", [stage(2, 50), stage(32, 80, 0.4), after], is_burst=True)
    write(blocks("Title", [], [burst], {"m": CEILINGS}), tmp_path)
    assert "as fast as before (at most twice that p99) after **1.2 s**." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((50, 90, 120), "and more users might get more."),
        ((50, 90, 100, 95), "100 requests/s with 4 users, p50 10.0 ms, p99 10.0 ms. 8 users get 95.0/s, no more; the"),
    ],
)
def test_a_ramp_that_ended_early_says_what_it_saw(tmp_path: Path, rates: Sequence[float], said: str) -> None:
    stages = [stage(2**i, rate) for i, rate in enumerate(rates)]
    write(blocks("Title", [], [Scenario("images", "Photos.", stages)], {"m": CEILINGS}), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"**Not saturated** by {2 ** (len(rates) - 1)} users: " in text and said in text
    assert f"| images | not by {2 ** (len(rates) - 1)} users |" in text


def test_both_forms_of_the_report_say_the_same(written: Path) -> None:
    markdown, html = (written / "report.md").read_text(), (written / "report.html").read_text()
    rows = [row for row in re.findall(r"^\| (.+) \|$", markdown, re.MULTILINE) if not row.startswith("---")]
    assert len(rows) == 18 and all(f">{escape(cell)}<" in html for row in rows for cell in row.split(" | "))
    assert "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |" in markdown, "names of kernels begin at the left"
    assert html.count('<td class="text">conv</td><td class="text">Conv</td><td class="text">m</td><td>') == 1
    assert "wrong &lt;label&gt;" in html and "<strong>Saturated at 16 users</strong>" in html
    figures = re.findall(r"\]\(([^)]+\.svg)\)", markdown)
    assert figures == ["images-curve.svg", "images-time.svg", "burst.svg"]
    for name in figures:
        svg = (written / name).read_text()
        ElementTree.fromstring(svg)
        assert svg in html
    assert not re.search(r"(src|href)=", html), "a report needs nothing from elsewhere"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH; CHROMIUM names one elsewhere")
def test_nobody_is_kept_from_reading_the_report(written: Path) -> None:
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
            page.goto((written / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline[^>]+points="([^"]+)"', svg)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]  # type: ignore[misc]


def test_lines_lie_where_their_values_are() -> None:
    svg = line_chart("t", "x", "y", [Line("a", [(0, 0), (10, 5), (20, 10)], ["p", "q"]), Line("b", [(20, 10)])])
    first, second = points_of(svg)
    assert first[-1] == second[0]
    assert first[1] == pytest.approx([(first[0][axis] + first[2][axis]) / 2 for axis in (0, 1)], abs=0.11)
    assert first[0][0] < first[2][0] and first[0][1] > first[2][1]
    assert ">p</text>" in svg and ">b</text>" in svg


def test_decades_of_a_logarithmic_axis_are_equally_high() -> None:
    mark = Mark(2, "here & there")
    svg = line_chart("t", "x", "y", [Line("a", [(1, 1), (2, 10), (3, 100)])], log_y=True, mark=mark)
    (line,) = points_of(svg)
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.11)
    assert "here &amp; there" in svg
    ElementTree.fromstring(svg)


def test_bars_stand_on_each_other() -> None:
    svg = stacked_bars("t", "ms", [("1", [1.0, 2.0]), ("2", [2.0, 2.0])], ["a", "b"])
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="#[^f]', svg)[:4]
    bars = [tuple(map(float, bar)) for bar in found]
    assert bars[1][1] + bars[1][2] == pytest.approx(bars[0][1], abs=0.11)
    assert bars[1][2] == pytest.approx(2 * bars[0][2], abs=0.2)


def test_marked_words_are_bold_and_code(tmp_path: Path) -> None:
    write([Heading(1, "T"), Paragraph("**b** `c`"), Table(["a", "b"], [["x", "1"]])], tmp_path)
    assert (tmp_path / "report.md").read_text() == "# T\n\n**b** `c`\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n"
    assert "<p><strong>b</strong> <code>c</code></p>" in (tmp_path / "report.html").read_text()
