"""The dashboard of kernels: where the engine's time goes, how near each kernel comes to what the device allows, and
whether it is as fast as it used to be."""

from grafana_foundation_sdk.builders import common, dashboard, xychart
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.xychart import SeriesMapping, XYShowMode

from deploy.grafana.panels import OF_MODEL, OF_SERVER, RATE, SOURCE, instant, lines, make, number, rows, values_of

_EACH = "{{model}} {{kernel}} {{op}}"
_BY = "sum by (model, version, kernel, op)"
_LEVEL = "job_instance_model_version_kernel_op"


def _done(what: str, window: str = RATE) -> str:
    return f"{_BY} (rate(engine_kernel_{what}_total{{{OF_MODEL}}}{window}))"


_SECONDS = f"({_done('seconds')} > 0)"
_FLOOR = f"{_BY} ({_LEVEL}:engine_kernel_floor_seconds:rate5m{{{OF_MODEL}}})"
_TIME = f"({_BY} ({_LEVEL}:engine_kernel_seconds:rate5m{{{OF_MODEL}}}) > 0)"
_ROOFLINE = f"{_FLOOR} / {_TIME}"


def kernels() -> dashboard.Dashboard:
    """The whole of it."""
    board = make(
        "Kernels", "tilewave-kernels", "Speed of every kernel against the device's own ceilings.", by_model=True
    )
    board.with_row(dashboard.Row("Against the hardware"))
    for ceiling in (
        number("FLOP ceiling", "Measured on the device itself.",
               f"max(engine_device_peak_flops_per_second{{{OF_SERVER}}})", units.FlopsPerSecond, span=6),
        number("Memory ceiling", "Measured on the device itself.",
               f'max(engine_device_peak_bytes_per_second{{{OF_SERVER}, level="memory"}})', units.BytesPerSecondSI,
               span=6),
        number("Cache ceiling", "Measured on the device itself.",
               f'max(engine_device_peak_bytes_per_second{{{OF_SERVER}, level="cache"}})', units.BytesPerSecondSI,
               span=6),
        number("All kernels", "The least time of the work done, of the time it took.",
               f"sum({_LEVEL}:engine_kernel_floor_seconds:rate5m{{{OF_MODEL}}}) / "
               f"(sum({_LEVEL}:engine_kernel_seconds:rate5m{{{OF_MODEL}}}) > 0)", units.PercentUnit, span=6),
    ):  # fmt: skip
        board.with_panel(ceiling)
    board.with_panel(_roofline())
    board.with_panel(
        lines("Share of the ceiling", "The least time at the measured ceilings, of the time it took.",
              [(_ROOFLINE, _EACH)], units.PercentUnit, span=12).height(11)
    )  # fmt: skip
    board.with_row(dashboard.Row("Where the time goes"))
    for panel in (
        lines("Time by kernel", "Seconds in kernels a second.", [(_done("seconds"), _EACH)], units.PercentUnit,
              stacked=True, span=12),
        lines("Time above the floor", "Seconds a second that the ceilings do not ask for: what a better kernel would "
              "win.", [(f"clamp_min({_TIME} - {_FLOOR}, 0)", _EACH)], units.PercentUnit, stacked=True, span=12),
        lines("FLOP rate", "Over the time it ran.", [(f"{_done('flops')} / {_SECONDS}", _EACH)],
              units.FlopsPerSecond),
        lines("Byte rate", "Over the time it ran.", [(f"{_done('bytes')} / {_SECONDS}", _EACH)],
              units.BytesPerSecondSI),
        lines("Time of a launch", "The mean.", [(f"{_done('seconds')} / ({_done('launches')} > 0)", _EACH)],
              units.Seconds),
    ):  # fmt: skip
        board.with_panel(panel)
    board.with_row(dashboard.Row("Against its own past"))
    _past(board)
    return board


def _roofline() -> xychart.Panel:
    """Intensity against FLOP rate, both logarithmic: a dot a kernel, and above it the dot that the roof allows."""
    queries = [
        (f"({_done('flops')} > 0) / ({_done('bytes')} > 0)", ""),
        (f"({_done('flops')} > 0) / {_SECONDS}", ""),
        (f"({_done('flops', '[5m]')} > 0) / ({_FLOOR} > 0)", ""),
    ]
    intensity, measured, roof = columns = ("FLOP per byte", "FLOP/s", "roof")
    panel = xychart.Panel().title("Roofline").datasource(SOURCE).span(12).height(11)
    panel.description(
        "A dot a kernel: its FLOPs for each byte, and its FLOP rate. The other series is what the ceilings allow for "
        "the same work; bytes that the cache can hold count against the cache."
    )
    panel.targets(list(instant(queries)))
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "renameByName": dict(zip(values_of(queries), columns, strict=True)),
            },
        )
    )
    panel.mapping(SeriesMapping.MANUAL).show(XYShowMode.POINTS)
    panel.series([_series(measured, intensity), _series(roof, intensity)])
    legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
    panel.legend(legend.display_mode(LegendDisplayMode.LIST))
    logarithmic = models.DynamicConfigValue(id_val="custom.scaleDistribution", value={"type": "log", "log": 10})
    for column, unit in ((intensity, units.Short), (measured, units.FlopsPerSecond), (roof, units.FlopsPerSecond)):
        panel.override_by_name(column, [models.DynamicConfigValue(id_val="unit", value=unit), logarithmic])
    return panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.SINGLE))


def _series(y: str, x: str) -> xychart.XYSeriesConfig:
    series = xychart.XYSeriesConfig().name(xychart.XychartXYSeriesConfigName().fixed(y))
    series.x(xychart.XychartXYSeriesConfigX().matcher(xychart.MatcherConfig().id("byName").options(x)))
    return series.y(xychart.XychartXYSeriesConfigY().matcher(xychart.MatcherConfig().id("byName").options(y)))


def _past(board: dashboard.Dashboard) -> None:
    speed = f"{_LEVEL}:engine_kernel_speed:ratio_of_baseline{{{OF_MODEL}}}"
    past = f"{_LEVEL}:engine_kernel_roofline:baseline_1d{{{OF_MODEL}}}"
    board.with_panel(
        lines("Speed, of its own baseline", "The baseline is the median of the day before. Below the line for ten "
              "minutes, TilewaveKernelSlow fires.",
              [(speed, "{{instance}} {{model}} {{kernel}} {{op}}"),
               ("tilewave:objective_kernel_speed:ratio", "objective")], units.PercentUnit, span=24)
    )  # fmt: skip
    board.with_panel(
        rows("Kernels", "Over the last minutes.",
             [(_done("seconds"), ""), (_done("launches"), ""), (f"{_done('flops')} / {_SECONDS}", ""),
              (f"{_done('bytes')} / {_SECONDS}", ""), (_ROOFLINE, ""),
              (f"avg by (model, version, kernel, op) ({past})", ""),
              (f"min by (model, version, kernel, op) ({speed})", "")],
             [("Time", units.PercentUnit), ("Launches", units.OpsPerSecond), ("FLOP/s", units.FlopsPerSecond),
              ("Bytes/s", units.BytesPerSecondSI), ("Of the ceiling", units.PercentUnit),
              ("Baseline", units.PercentUnit), ("Of its baseline", units.PercentUnit)], height=12)
    )  # fmt: skip
