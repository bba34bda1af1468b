"""The dashboards: made from their source, known to Grafana's own schema, laid out without overlap, asking for metrics
that exist."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.build import FOLDER, dashboards
from tests.deploy.prometheus import DEPLOY, ROOT, RULES, expressions

PROVISIONING = DEPLOY / "grafana" / "provisioning"
_WIDTH = 24
_UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}
_OF_PROMETHEUS = {"up", "ALERTS"}


@pytest.fixture(params=sorted(dashboards()))
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / request.param).read_text())
    return found


def test_the_files_are_what_their_source_makes() -> None:
    made = dashboards()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    stale = [name for name, content in made.items() if (FOLDER / name).read_text() != content]
    assert stale == [], "run `make dashboards`"


def test_grafanas_schema_knows_every_field(board: dict[str, Any]) -> None:
    """Its models read only what they know: what they write again must be all there was."""
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert again == board


def test_the_schema_would_notice_an_unknown_field(board: dict[str, Any]) -> None:
    register_default_plugins()
    panel = next(panel for panel in board["panels"] if panel["type"] != "row")
    panel["options"]["colour"] = "red"
    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) != board


def test_panels_have_ids_descriptions_known_units_and_places_of_their_own(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= _WIDTH
        if panel["type"] == "row":
            continue
        assert panel["title"] and panel["description"] and panel["targets"]
        assert {target["refId"] for target in panel["targets"]} == set("ABCDEFGH"[: len(panel["targets"])])
        config = panel.get("fieldConfig", {"defaults": {}, "overrides": []})  # a heatmap has its unit at the axis
        used = {config["defaults"].get("unit"), panel["options"].get("yAxis", {}).get("unit")}
        used |= {p["value"] for o in config["overrides"] for p in o["properties"] if p["id"] == "unit"}
        assert used - {None} and used - {None} <= _UNITS
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = any(
            a[axis] + a[size] <= b[axis]
            for a, b in ((one, other), (other, one))
            for axis, size in (("x", "w"), ("y", "h"))
        )
        assert apart, (one, other)


def test_queries_ask_for_what_is_exported_or_recorded(board: dict[str, Any]) -> None:
    """Names are those of docs/metrics.md, which tests hold against the server, and of the recording rules."""
    documented = set(
        re.findall(r"`((?:inference|engine|http|process)_\w+)`", (ROOT / "docs" / "metrics.md").read_text())
    )
    documented |= {"process_cpu_seconds_total", "process_resident_memory_bytes"}  # of the client library
    histograms = {f"{name}_{part}" for name in documented for part in ("bucket", "sum", "count")}
    rules = [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for where, expression in expressions(board):
        bare = re.sub(r'"[^"]*"|\[[^\]]*\]|(?:by|on) \([^)]*\)', "", expression)
        names = set(re.findall(r"[A-Za-z_][\w:]*(?![\w:]|\s*\()", bare)) - {"or", "and", "bool"}
        names -= set(re.findall(r"(\w+)\s*=~?", bare))
        unknown = names - documented - histograms - recorded - _OF_PROMETHEUS
        assert unknown == set(), f"{where}: {expression}"


def test_variables_and_data_source_are_those_that_are_provisioned(board: dict[str, Any]) -> None:
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = {name for _, text in expressions(board) for name in re.findall(r"\$(\w+)", text)} - {"__rate_interval"}
    assert used <= names and "datasource" in names
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_panels_with_several_series_say_which_is_which(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        if panel["type"] in ("timeseries", "xychart"):
            assert panel["options"]["legend"]["showLegend"] is True, panel["title"]


def test_dashboards_have_names_of_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in sorted(Path(FOLDER).iterdir())]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 3
