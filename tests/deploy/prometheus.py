"""Debian's Prometheus for tests: where its programs are, a running one, and rules whose time runs faster.

`make test` puts the package into the virtual environment where the system has none (Makefile, `get-prometheus`). Where
there is neither, tests that need it are skipped and say so.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from load_tests.servers import free_port

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
TIMES = 200.0
"""How much faster time runs in the tests that scrape: five minutes are a second and a half."""

BOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
_PACKAGE = Path(sys.prefix) / "prometheus" / "usr" / "bin"
_DURATION = re.compile(r"(?<![\w.])(\d+)(ms|s|m|h|d)\b")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def program(name: str) -> str | None:
    """`prometheus` or `promtool`: of the virtual environment, else of the system."""
    own = _PACKAGE / name
    return str(own) if own.exists() else shutil.which(name)


needs_prometheus = pytest.mark.skipif(
    program("prometheus") is None or program("promtool") is None,
    reason="Debian's package prometheus is not there, and `make test` could not get it",
)


def promtool(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """What promtool says."""
    path = program("promtool")
    assert path is not None
    return subprocess.run([path, *map(str, arguments)], input=text, text=True, capture_output=True, check=False)


def faster(text: str, times: float) -> str:
    """Durations of PromQL or of a configuration, so many times shorter. Names such as `rate5m` stay."""

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[1]) * _SECONDS[found[2]]
        return f"{max(1, round(seconds / times * 1000))}ms"

    return _DURATION.sub(shorter, text)


class Prometheus:
    """A running one."""

    def __init__(self, url: str, times: float) -> None:
        self.times = times
        self._client = httpx.Client(base_url=url, timeout=10, verify=False)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{path} {parameters}: {body}"
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now, those without a number left out. Its durations are made shorter."""
        found: list[dict[str, Any]] = self.get("query", query=faster(expression, self.times))["result"]
        return [series for series in found if math.isfinite(float(series["value"][1]))]

    def value(self, expression: str) -> float:
        """The first value of an expression, as soon as there is one: after a scrape that failed there is none."""
        wait(lambda: self.query(expression), f"{expression} has data", 20)
        return max((float(series["value"][1]) for series in self.query(expression)), default=math.nan)

    def rules(self) -> list[dict[str, Any]]:
        """All rules."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def alerts(self, name: str, state: str = "firing") -> list[dict[str, Any]]:
        """The alerts of a name in a state."""
        return [a for a in self.get("alerts")["alerts"] if a["labels"]["alertname"] == name and a["state"] == state]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


@contextmanager
def running(folder: Path, target: str, times: float) -> Iterator[Prometheus]:
    """A Prometheus with this project's own configuration, which scrapes `target` ("host:port") instead, and whose time
    runs `times` faster. `folder` gets its files."""
    rules = folder / "rules"
    rules.mkdir()
    for path in RULES:
        (rules / path.name).write_text(faster(path.read_text(), times))
    own = f"127.0.0.1:{free_port()}"
    text = faster((DEPLOY / "prometheus" / "prometheus.yml").read_text(), times)
    for name, place in (("tilewave:8000", target), ("localhost:9090", own)):
        assert name in text
        text = text.replace(name, place)
    config: dict[str, Any] = yaml.safe_load(text)
    # Not as much shorter: a scrape of a busy machine takes its time, and one that takes longer than this fails.
    config["global"] |= {"scrape_interval": "250ms", "scrape_timeout": "250ms"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        str(program("prometheus")),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={own}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    prometheus = Prometheus(f"http://{own}", times)
    try:
        wait(lambda: process.poll() is None and _answers(own), "Prometheus answers", 20)
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(20)


def _answers(own: str) -> bool:
    try:
        return httpx.get(f"http://{own}/-/ready", verify=False).status_code == 200
    except httpx.TransportError:
        return False


def wait(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Wait until a condition holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it never came true that {what}"
        time.sleep(0.05)


def expressions(board: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(where, PromQL) of everything that a dashboard asks, its variables left in."""
    targets = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    return targets + [(a["name"], a["expr"]) for a in board["annotations"]["list"] if "expr" in a]


def empty_queries(prometheus: Prometheus, ignored: str = "") -> list[tuple[str, str, str]]:
    """The queries of dashboards without a finite value, after every query of a variable has given it its values. Those
    of the metric `ignored` are left out."""
    empty = []
    asked = 0
    for path in BOARDS:
        board = json.loads(path.read_text())
        values = {"__rate_interval": "5m", "datasource": "prometheus"}
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
                found = {one["metric"].get(label) for one in prometheus.query(_filled(series, values))}
                assert found and None not in found, f"{path.name}: variable {variable['name']} has no values"
                values[variable["name"]] = "|".join(sorted(found))
        for where, expression in expressions(board):
            asked += 1
            if ignored and ignored in expression:
                continue
            filled = _filled(expression, values)
            try:
                wait(lambda filled=filled: prometheus.query(filled), "it has data", 5)
            except AssertionError:
                empty.append((path.name, where, filled))
    assert asked > 50
    return empty


def _filled(expression: str, values: dict[str, str]) -> str:
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expression)
    assert "$" not in filled
    return filled
