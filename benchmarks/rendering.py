"""Rows of a suite as a Markdown table, each kind of row in its own way. `tables.py` puts them into the documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from benchmarks import attentions, cases, convolutions, packed
from benchmarks.cases.accuracy import BOUNDS, AccuracyCase
from benchmarks.cases.attention import AttentionCase
from benchmarks.cases.conv import ConvCase
from benchmarks.cases.exports import ExportCase
from benchmarks.cases.memory import MemoryCase
from benchmarks.cases.metrics import BANDS, MetricsCase
from benchmarks.cases.packed import PackedCase
from benchmarks.cases.ready import ReadyCase
from benchmarks.results import Results, Row, geometric_mean

_PEER_VERSIONS = ("torch", "cudnn", "onnxruntime")


def render(results: Results, rows: Sequence[Row]) -> str:
    """Rows of one suite as a Markdown table with a line that says where they come from. Times in µs."""
    (suite,) = {row.suite for row in rows}
    return _OWN.get(suite, _timed)(results, rows)


def _timed(results: Results, rows: Sequence[Row]) -> str:
    """Rows of times beside peers as a Markdown table."""
    suite = rows[0].suite
    is_convolution = suite == ConvCase.suite
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("ours", lambda row: "**failed**" if row.failure else _us(row.ours_us))
    ]
    columns += [(name, partial(_peer, name)) for name in _names(row.peers for row in rows)]
    columns += [(name, partial(_part_of, name)) for name in _names(row.parts for row in rows)]
    if is_convolution:
        columns += [(name, partial(_figure, figure)) for name, figure in _CONVOLUTION_RATIOS.items()]
    else:
        columns.append(("ratio", lambda row: _two_digits(row.ratio)))
    if any(row.floor_us is not None for row in rows):
        columns.append(("floor", lambda row: _us(row.floor_us)))
    if is_convolution:
        columns.append(("of floor", lambda row: _two_digits(convolutions.floor_share(row))))
    if suite == AttentionCase.suite:
        columns += [(name, partial(_rate, figure)) for name, figure in _ATTENTION_RATES.items()]
    if any(row.predicted_us is not None for row in rows):
        columns.append(("predicted", lambda row: _us(row.predicted_us)))
    if any(row.run_us is not None for row in rows):
        columns.append(("`Model.run`", lambda row: _us(row.run_us)))
    columns += [(f"host, `{name}`", partial(_host, name)) for name in _names(row.host_us for row in rows)]
    columns.append(("error", lambda row: "–" if row.rel_err is None else f"{row.rel_err:.0e}"))
    lines = [_row(["case", *(head for head, _ in columns)]), _row(["---", *["---:"] * len(columns)])]
    lines += [_row([row.case, *(cell(row) for _, cell in columns)]) for row in rows]
    said = _convolutions(rows) if is_convolution else _summary(rows)
    return "\n".join([*lines, "", *said, _origin(results, rows), ""])


_ATTENTION_RATES = {"TFLOP/s": attentions.tflops, "FlashAttention-3's, published": attentions.flash3_tflops}
_CONVOLUTION_RATIOS = {"× eager": convolutions.eager_ratio, "× cuDNN": convolutions.cudnn_ratio}


def _figure(figure: Callable[[Row], float | None], row: Row) -> str:
    return _two_digits(figure(row))


def _rate(figure: Callable[[Row], float | None], row: Row) -> str:
    value = figure(row)
    return "–" if value is None else f"{value:.0f}"


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _peer(name: str, row: Row) -> str:
    return _us(row.peers.get(name))


def _part_of(name: str, row: Row) -> str:
    return _us(row.parts.get(name))


def _host(name: str, row: Row) -> str:
    return _us(row.host_us.get(name))


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """The rows in a line: geometric mean and least of the ratios; of ours over what was predicted, mean and spread."""
    ratios = [row.ratio for row in rows if row.ratio]
    said: list[str] = []
    if ratios:
        said.append(
            f"Ratio: {geometric_mean(ratios):.2f} in the geometric mean of {len(ratios)}, {min(ratios):.2f} at least"
        )
    quotients = [row.ours_us / row.predicted_us for row in rows if row.ours_us and row.predicted_us]
    if quotients:
        said.append(
            f"ours over predicted: {geometric_mean(quotients):.2f} in the geometric mean, "
            f"{min(quotients):.2f} to {max(quotients):.2f}"
        )
    if said:
        yield f"{'; '.join(said)}."
        yield ""


def _convolutions(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of convolutions by kind and batch as a table, and those that are behind by name."""
    heads = ["kind", "batch", "rows", "× cuDNN", "least", "× eager", "of floor", "behind"]
    yield from (_row(heads), _row(["---", *["---:"] * (len(heads) - 1)]))
    for one in convolutions.summaries(rows):
        means = map(_two_digits, (one.cudnn, one.least, one.eager, one.floor))
        batch = "all" if one.batch is None else str(one.batch)
        yield _row([one.group, batch, str(one.rows), *means, str(one.behind)])
    behind = [f"{row.case} ({_figure(convolutions.cudnn_ratio, row)})" for row in rows if convolutions.is_behind(row)]
    yield ""
    yield (
        f"Geometric means. Behind, that is under {convolutions.LEVEL:g} of cuDNN's best and under "
        f"{convolutions.NEAR_FLOOR:g} of the floor: {len(behind)}{': ' if behind else ''}{', '.join(behind)}."
    )
    yield ""


def _ready(results: Results, rows: Sequence[Row]) -> str:
    """Rows of the server's start as a Markdown table."""
    events = _names(row.seconds for row in rows)
    lines = [_row(["case", *events]), _row(["---", *["---:"] * len(events)])]
    for row in rows:
        cells = [f"{row.seconds[event]:.2f}" if event in row.seconds else "–" for event in events]
        lines.append(_row([f"{row.case} **failed**" if row.failure else row.case, *cells]))
    return "\n".join([*lines, "", f"Seconds from the start. {_source(results, rows)}.", ""])


def _packed(results: Results, rows: Sequence[Row]) -> str:
    """Rows of encoders on packed tokens as a Markdown table."""
    heads = packed.heads(rows)
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)]), *map(_row, packed.cells(rows))]
    return "\n".join([*lines, "", f"{packed.summary(rows)} {_source(results, rows)}.", ""])


def _metrics(results: Results, rows: Sequence[Row]) -> str:
    """Rows of what the kernel metrics cost and tell as a Markdown table."""
    times = {"graph_us": "graph", "stamps_us": "Σ stamps", "serial_us": "serial", "overlap_us": "overlap",
             "ncu_stamps_us": "Σ stamps under ncu", "ncu_us": "Σ ncu"}  # fmt: skip
    heads = ["case", "launch, with/without", "one run in", "every run stamped", "run, with/without", *times.values()]
    heads += ["ncu - stamp, empty", *BANDS]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for row in rows:
        one_in = row.figures.get("launch_one_in")
        cells = [_interval(row.figures, "launch"), "–" if one_in is None else f"{one_in:.0f}"]
        cells += [_interval(row.figures, what) for what in ("each", "run")]
        cells += [_us(row.figures.get(name)) for name in times]
        cells += [_offset(row.figures), *(_deviation(row.figures, band) for band in BANDS)]
        lines.append(_row([f"{row.case} **failed**" if row.failure else row.case, *cells]))
    said = (
        "Throughput with stamps over that without, with its 95 % confidence interval: of launches of a bound model in "
        "a stream, where one run in so many writes stamps; of the same where every run does; and of `Model.run` from "
        "two threads. µs a run at full load: as a graph, the sum of the stamps of all kernels, as a graph in which no "
        "kernel starts before the one before it has ended, and by how much the latter is longer: what dependent "
        "launches overlap. Under ncu, one kernel at a time: the sums of stamps and of ncu's durations of the same "
        "launches, and by how much its duration exceeds the stamp of kernels that do nothing else (the median, and the "
        "range over their shapes). Stamps with that offset beside ncu, by the duration of a kernel: median and worst "
        "deviation, number of kernels, how many are beyond the bound; the median without the offset."
    )
    return "\n".join([*lines, "", f"{said} {_source(results, rows)}.", ""])


def _interval(figures: Mapping[str, float], what: str) -> str:
    if f"{what}_ratio" not in figures:
        return "–"
    ratio, low, high = (figures[f"{what}_{part}"] for part in ("ratio", "low", "high"))
    return f"{ratio:.4f} ({low:.4f}–{high:.4f})"


def _offset(figures: Mapping[str, float]) -> str:
    if "offset_us" not in figures:
        return "–"
    shapes = [us for name, us in figures.items() if name.startswith("offset ")]
    return f"{figures['offset_us']:.2f} ({min(shapes):.2f}–{max(shapes):.2f})"


def _deviation(figures: Mapping[str, float], band: str) -> str:
    if f"{band} kernels" not in figures:
        return "–"
    middle, worst, raw = (figures[f"{band} {part}"] for part in ("median", "worst", "median without offset"))
    kernels, beyond = (figures[f"{band} {part}"] for part in ("kernels", "beyond"))
    return f"{middle:+.1%}, {worst:+.1%} ({kernels:.0f}{f', {beyond:.0f} beyond' if beyond else ''}); {raw:+.1%}"


def _memory(results: Results, rows: Sequence[Row]) -> str:
    """Rows of what a long sequence takes as a Markdown table."""
    sizes = {"tensors_bytes": "q, k, v, result", "arena_bytes": "arena", "model_bytes": "the engine's, all",
             "device_bytes": "the device's, all", "scores_bytes": "scores, were they kept"}  # fmt: skip
    lines = [_row(["case", "error", *sizes.values()]), _row(["---", *["---:"] * (1 + len(sizes))])]
    for row in rows:
        error = "–" if row.rel_err is None else f"{row.rel_err:.1e}"
        taken = [f"{row.facts[name] / 1e6:,.0f}" if name in row.facts else "–" for name in sizes]
        lines.append(_row([f"{row.case} **failed**" if row.failure else row.case, error, *taken]))
    return "\n".join([*lines, "", f"MB (10⁶ bytes). {_source(results, rows)}.", ""])


_COUNTS = ("steps", "opaque", "kernels")
_MEGABYTES = {"activations_bytes": "activations", "arena_bytes": "arena", "weights_bytes": "weights",
              "buckets_bytes": "8 plans, all"}  # fmt: skip


def _accuracy(results: Results, rows: Sequence[Row]) -> str:
    """Rows of errors, counts and memory as a Markdown table."""
    bounds = {case.name: BOUNDS[case.precision] for case in cases.ACCURACY}
    lines = [_row(["case", "error", "bound", *_COUNTS, *_MEGABYTES.values()])]
    lines.append(_row(["---", *["---:"] * (2 + len(_COUNTS) + len(_MEGABYTES))]))
    for row in rows:
        error = "–" if row.rel_err is None else f"{row.rel_err:.1e}"
        counts = [str(row.facts.get(name, "–")) for name in _COUNTS]
        sizes = [f"{row.facts[name] / 1e6:,.1f}" if name in row.facts else "–" for name in _MEGABYTES]
        failed = f"**failed** {error}" if row.failure else error
        lines.append(_row([row.case, failed, f"{bounds[row.case]:g}", *counts, *sizes]))
    return "\n".join([*lines, "", f"MB (10⁶ bytes). {_source(results, rows)}.", ""])


_ORIGIN = re.compile(r"^(\w+) '[^']*'?(:?) ")  # of a refusal: the node's name, which may be cut off


def _exports(results: Results, rows: Sequence[Row]) -> str:
    """Rows of exports as a Markdown table: attentions recognised, packed or why not, errors."""
    attentions = {case.name: case.attentions for case in cases.exports.CASES}
    names = ("PyTorch", "ONNX Runtime")
    heads = ["export", "written by", "opset", "fused", "packed", *(f"from {name}" for name in names)]
    lines = [_row(heads), _row(["---", "---", "---:", "---:", "---", "---:", "---:"])]
    for row in rows:
        why = _ORIGIN.sub(r"\1\2 ", row.reasons.get("packed", ""))
        packed = "yes" if row.facts.get("packed") else why if why.startswith("no ") else f"no: {why}"
        fused = f"{row.facts.get('attentions', 0)} of {attentions[row.case]}"
        errors = [f"{row.errors[name]:.0e}" if name in row.errors else "–" for name in names]
        case = f"{row.case} **failed**" if row.failure else row.case
        lines.append(_row([case, row.producer, str(row.facts.get("opset", "–")), fused, packed, *errors]))
    return "\n".join([*lines, "", f"{_source(results, rows)}.", ""])


_OWN = {
    AccuracyCase.suite: _accuracy, ReadyCase.suite: _ready, MetricsCase.suite: _metrics, ExportCase.suite: _exports,
    PackedCase.suite: _packed, MemoryCase.suite: _memory,
}  # fmt: skip
"""How rows without the usual times become a table, by their suite."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(value: float | None) -> str:
    """Three digits, none of them after the point from 100 on."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _origin(results: Results, rows: Sequence[Row]) -> str:
    return f"µs a run. {_source(results, rows)}."


def _source(results: Results, rows: Sequence[Row]) -> str:
    runs = [results.runs[key] for key in sorted({row.run for row in rows})]
    newest = runs[-1]
    facts = [
        results.device.name,
        *([f"driver {newest.driver}"] if newest.driver else []),
        *(f"{name} {newest.versions[name]}" for name in _PEER_VERSIONS if name in newest.versions),
        f"commit {', '.join(dict.fromkeys(run.commit for run in runs))}",
        ", ".join(dict.fromkeys(run.date for run in runs)),
    ]
    return "; ".join(facts)
