"""What was measured, in the words, tables and figures of a report. Pure: stages in, blocks out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from load_tests.capacity.charts import Line, Mark, line_chart, stacked_bars
from load_tests.capacity.document import Block, Figure, Heading, Paragraph, Table
from load_tests.capacity.saturation import (
    ENOUGH,
    Stage,
    is_saturated,
    percentile,
    saturation_point,
    sum_failures,
)
from load_tests.capacity.scrape import Ceilings, Split

_TOP_KERNELS = 8
_PARTS = ("queue", "preprocess", "compute", "rest")


@dataclass(frozen=True)
class Scenario:
    """What was sent, in words, and the stages in the order in which they ran. `is_burst`: few users, many, few again;
    else more and more."""

    name: str
    about: str
    stages: Sequence[Stage]
    is_burst: bool = False


def blocks(
    title: str, facts: Sequence[str], scenarios: Sequence[Scenario], ceilings: Mapping[str, Ceilings]
) -> list[Block]:
    """The whole report."""
    found: list[Block] = [Heading(1, title), *(Paragraph(fact) for fact in facts)]
    ramps = [scenario for scenario in scenarios if not scenario.is_burst]
    if ramps:
        found += [Heading(2, "In short"), _overview(ramps)]
    for scenario in scenarios:
        found += [Heading(2, scenario.name[0].upper() + scenario.name[1:]), Paragraph(scenario.about)]
        found += _burst(scenario) if scenario.is_burst else _ramp(scenario, ceilings)
        failures = sum_failures(scenario.stages)
        for text, count in failures.most_common(5):
            found.append(Paragraph(f"**Failed {count} times:** {text}"))
    return found


def _overview(ramps: Sequence[Scenario]) -> Table:
    head = ["scenario", "saturated at", "requests/s", "p50", "p99", "p99 with one user"]
    rows = []
    for ramp in ramps:
        point = saturation_point(ramp.stages)
        where = _users(point.users) if is_saturated(ramp.stages) else f"not by {_users(ramp.stages[-1].users)}"
        latencies = (point.percentile(50), point.percentile(99), ramp.stages[0].percentile(99))
        cells = [_rate(point.rate), *map(_ms, latencies)]
        rows.append([ramp.name, where, *cells])
    return Table(head, rows)


def _ramp(scenario: Scenario, ceilings: Mapping[str, Ceilings]) -> list[Block]:
    stages, point = scenario.stages, saturation_point(scenario.stages)
    return [
        Paragraph(_verdict(stages, point)),
        Figure(f"{scenario.name}-curve", f"Latency over throughput, {scenario.name}", _curve(scenario, point)),
        _levels(stages),
        Heading(3, "Where the time goes"),
        Figure(f"{scenario.name}-time", f"Where the time goes, {scenario.name}", _bars(scenario)),
        _parts(stages),
        Heading(3, f"Kernels with {_users(point.users)}"),
        _kernels(point.split, ceilings),
    ]


def _verdict(stages: Sequence[Stage], point: Stage) -> str:
    most = max(stages, key=lambda stage: stage.rate)
    last = stages[-1]
    users, latency = _users(point.users), f"p50 {_ms(point.percentile(50))}, p99 {_ms(point.percentile(99))}"
    found = f"{_rate(point.rate)} requests/s with {users}, {latency}"
    if not is_saturated(stages):
        rest = ", and more users might get more."
        if last is not most:
            rest = f". {_users(last.users)} get {_rate(last.rate)}/s, no more; the ramp ended before it was sure."
        return f"**Not saturated** by {_users(last.users)}: {found}{rest}"
    return (
        f"**Saturated at {users}**: {found}. That is {ENOUGH:.0%} or more of the most seen, {_rate(most.rate)}/s with "
        f"{most.users}. Beyond it users wait for each other: {last.users} get {_rate(last.rate)}/s with a p99 of "
        f"{_ms(last.percentile(99))}."
    )


def _curve(scenario: Scenario, point: Stage) -> str:
    stages = [stage for stage in scenario.stages if stage.latencies]
    labels = [f"{stage.users}" for stage in stages]
    lines = [
        Line(f"p{percent}", [(s.rate, s.percentile(percent) * 1e3) for s in stages], labels if percent == 50 else ())
        for percent in (50, 95, 99)
    ]
    mark = Mark(point.rate, f"saturated: {_users(point.users)}") if is_saturated(scenario.stages) else None
    return line_chart(f"{scenario.name}: numbers are users", "requests/s", "ms", lines, log_y=True, mark=mark)


def _levels(stages: Sequence[Stage]) -> Table:
    head = ["users", "requests/s", "p50", "p95", "p99", "refused/s", "failed", "CPUs of the server", "of the users"]
    rows = [
        [
            str(stage.users), _rate(stage.rate), *(_ms(stage.percentile(percent)) for percent in (50, 95, 99)),
            f"{stage.refused / stage.seconds:.1f}", str(stage.failed),
            f"{stage.split.server_cpu / stage.split.wall:.2f}", f"{stage.generator_cpu / stage.seconds:.2f}",
        ]
        for stage in stages
    ]  # fmt: skip
    return Table(head, rows)


def _means(split: Split) -> list[float]:
    """Milliseconds of each part in the mean request."""
    return [getattr(split, part) / max(split.requests, 1) * 1e3 for part in _PARTS]


def _bars(scenario: Scenario) -> str:
    bars = [(str(stage.users), _means(stage.split)) for stage in scenario.stages]
    return stacked_bars(f"{scenario.name}: the mean request", "ms", bars, _PARTS)


def _parts(stages: Sequence[Stage]) -> Table:
    head = ["users", "queue", "preprocess", "compute", "rest", "rows a run", "padding", "kernels run"]
    rows = []
    for stage in stages:
        split = stage.split
        padding = split.padding / (split.tokens + split.padding) if split.tokens else math.nan
        rows.append(
            [
                str(stage.users),
                *(f"{mean:.2f} ms" for mean in _means(split)),
                f"{split.rows / max(split.batches, 1):.2f}",
                _percent(padding),
                f"{_percent(split.kernel_seconds / split.wall)} of the time",
            ]
        )
    return Table(head, rows)


def _kernels(split: Split, ceilings: Mapping[str, Ceilings]) -> Table:
    head = ["kernel", "op", "model", "launches/s", "of the kernels' time", "FLOP/s", "B/s", "of the roofline"]
    rows = []
    for kernel in split.kernels[:_TOP_KERNELS]:
        allowed = ceilings.get(kernel.model)
        rows.append(
            [
                kernel.kernel,
                kernel.op,
                kernel.model,
                _rate(kernel.launches / split.wall),
                _percent(kernel.seconds / split.kernel_seconds),
                _si(kernel.flops / kernel.seconds),
                _si(kernel.bytes / kernel.seconds),
                _percent(kernel.roofline(allowed)) if allowed is not None else "–",
            ]
        )
    return Table(head, rows, texts=3)


def _burst(scenario: Scenario) -> list[Block]:
    before, burst, after = scenario.stages
    usual = before.percentile(99)
    # The answers that were asked for during the burst are slow; the next ones show whether it left anything behind.
    late = max((at for at, latency in after.timeline if latency > 2 * usual), default=0.0)
    recovered = f"are as fast as before (at most twice that p99) after **{late:.1f} s**"
    if not any(at > late for at, _ in after.timeline):
        recovered = f"are **not as fast as before** (at most twice that p99) within {after.seconds:.0f} s"
    text = (
        f"{before.users} users, then {burst.users} for {burst.seconds:.0f} s, then {after.users} again. p99 goes from "
        f"{_ms(usual)} to {_ms(burst.percentile(99))}; requests refused: {burst.refused}, failed: {burst.failed}. "
        f"Answers {recovered}."
    )
    lines = [Line(f"p{percent}", _timeline(scenario.stages, percent)) for percent in (50, 99)]
    svg = line_chart(f"{scenario.name}: latency in each second", "s", "ms", lines, log_y=True)
    return [
        Paragraph(text),
        Figure(scenario.name, f"Latency over time, {scenario.name}", svg),
        _levels(scenario.stages),
    ]


def _timeline(stages: Sequence[Stage], percent: float) -> list[tuple[float, float]]:
    """(second, percentile in milliseconds) over all stages, one after the other."""
    points, start = [], 0.0
    for stage in stages:
        for second in range(math.ceil(stage.seconds)):
            ordered = sorted(latency for at, latency in stage.timeline if second <= at < second + 1)
            if ordered:
                points.append((start + second + 0.5, percentile(ordered, percent) * 1e3))
        start += stage.seconds
    return points


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return (
        "–" if math.isnan(seconds) else f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"
    )


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{fraction:.0%}" if fraction >= 0.1 else f"{fraction:.1%}"


def _si(value: float) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"
