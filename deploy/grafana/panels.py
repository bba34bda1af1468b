"""What the dashboards are made of: queries, panels of each kind, variables. Called by the dashboard modules.

Panels are typed by Grafana's own schema (package grafana-foundation-sdk, for development only).
"""

from collections.abc import Sequence

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
REF_IDS = "ABCDEFGH"
OF_SERVER = 'job=~"$job"'
OF_MODEL = f'{OF_SERVER}, model=~"$model", version=~"$version"'
RATE = "[$__rate_interval]"

Queries = Sequence[tuple[str, str]]
"""(PromQL, legend), in the order of their letters."""


def _targets(queries: Queries, instant: bool = False, exemplars: bool = False) -> list[prometheus.Dataquery]:
    targets = []
    for ref_id, (expression, legend) in zip(REF_IDS, queries, strict=False):
        target = prometheus.Dataquery().ref_id(ref_id).expr(expression).legend_format(legend).datasource(SOURCE)
        if exemplars:
            target.exemplar(True)
        targets.append(target.instant().format(PromQueryFormat.TABLE) if instant else target.range())
    return targets


def lines(
    title: str,
    text: str,
    queries: Queries,
    unit: str,
    *,
    span: int = 8,
    stacked: bool = False,
    most: float | None = None,
    exemplars: bool = False,
) -> timeseries.Panel:
    """Lines over time; `stacked`: areas on top of each other, for parts of a whole."""
    panel = timeseries.Panel().title(title).description(text).datasource(SOURCE).unit(unit).min(0).span(span).height(8)
    panel.targets(list(_targets(queries, exemplars=exemplars)))
    panel.show_points(common.VisibilityMode.NEVER).line_width(1).fill_opacity(40 if stacked else 6)
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    panel.legend(legend.display_mode(common.LegendDisplayMode.LIST))
    panel.tooltip(
        common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if most is not None:
        panel.max(most)
    return panel


def number(
    title: str, text: str, query: str, unit: str, *, limits: tuple[float, float] | None = None, span: int = 4
) -> stat.Panel:
    """One number with its recent course; `limits`: from where it is yellow, from where red."""
    panel = stat.Panel().title(title).description(text).datasource(SOURCE).unit(unit).span(span).height(4)
    panel.targets(list(_targets([(query, "")])))
    panel.graph_mode(common.BigValueGraphMode.AREA)
    panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    steps = [models.Threshold(value=None, color="green")]
    if limits is not None:
        steps += [models.Threshold(value=at, color=c) for at, c in zip(limits, ("yellow", "red"), strict=True)]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))


def histogram(
    title: str, text: str, query: str, unit: str, *, span: int = 12, exemplars: bool = False
) -> heatmap.Panel:
    """The buckets of a histogram over time. `query` gives a series for each `le`."""
    panel = heatmap.Panel().title(title).description(text).datasource(SOURCE).span(span).height(8)
    (target,) = _targets([(query, "{{le}}")], exemplars=exemplars)
    panel.with_target(target.format(PromQueryFormat.HEATMAP))
    panel.calculate(False)
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
    panel.y_axis(heatmap.YAxisConfig().unit(unit).min(0))
    return panel


def rows(
    title: str,
    text: str,
    queries: Queries,
    columns: Sequence[tuple[str, str]],
    *,
    hidden: Sequence[str] = (),
    span: int = 24,
    height: int = 10,
) -> table.Panel:
    """A table of the newest values, a row for each set of labels. `columns`: name and unit of each query's values, the
    first of which sorts; `hidden`: labels that are not shown."""
    panel = table.Panel().title(title).description(text).datasource(SOURCE).span(span).height(height)
    panel.align(common.FieldTextAlignment.AUTO)
    panel.targets(list(_targets(queries, instant=True)))
    names = values_of(queries)
    renamed = {name: column for name, (column, _) in zip(names, columns, strict=True)}
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={"excludeByName": dict.fromkeys(("Time", *hidden), True), "renameByName": renamed},
        )
    )
    for column, unit in columns:
        panel.override_by_name(column, [models.DynamicConfigValue(id_val="unit", value=unit)])
    return panel.sort_by([common_builders.TableSortByFieldState().display_name(columns[0][0]).desc(True)])


def values_of(queries: Queries) -> list[str]:
    """The names that Grafana gives the values of several queries in one table."""
    return ["Value"] if len(queries) == 1 else [f"Value #{ref_id}" for ref_id, _ in zip(REF_IDS, queries, strict=False)]


def instant(queries: Queries) -> list[prometheus.Dataquery]:
    """Queries for the newest values, as tables."""
    return _targets(queries, instant=True)


def make(name: str, uid: str, text: str, *, by_model: bool) -> dashboard.Dashboard:
    """An empty dashboard with the links, variables and annotations that all have; `by_model`: with a choice of
    models."""
    board = dashboard.Dashboard(f"Tilewave / {name}").uid(uid).description(text).tags(["tilewave"]).readonly()
    board.timezone("browser").time("now-1h", "now").refresh("15s").tooltip(models.DashboardCursorSync.CROSSHAIR)
    link = dashboard.DashboardLink("Tilewave").type(models.DashboardLinkType.DASHBOARDS).tags(["tilewave"])
    board.link(link.as_dropdown(False).include_vars(True).keep_time(True).icon("external link"))
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    board.with_variable(_choice("job", "label_values(inference_inflight, job)"))
    if by_model:
        board.with_variable(_choice("model", f"label_values(inference_inflight{{{OF_SERVER}}}, model)"))
        query = f'label_values(inference_inflight{{{OF_SERVER}, model=~"$model"}}, version)'
        board.with_variable(_choice("version", query))
    alerts = dashboard.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red")
    return board.annotation(alerts.expr('ALERTS{alertstate="firing", alertname=~"Tilewave.+"}'))


def _choice(name: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(query)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    variable.current(models.VariableOption(text="All", value="$__all"))
    return variable.multi(True).include_all(True)
