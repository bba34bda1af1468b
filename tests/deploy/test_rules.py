"""Prometheus's own checker on the configuration, and what each alert waits for, on series made up for it."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.deploy.prometheus import DEPLOY, ROOT, RULES, faster, needs_prometheus, promtool

OPERATIONS = ROOT / "docs" / "operations.md"


@needs_prometheus
def test_promtool_finds_nothing_in_configuration_and_rules() -> None:
    config = DEPLOY / "prometheus" / "prometheus.yml"
    for done in (promtool("check", "config", "--lint=all", config), promtool("check", "rules", "--lint=all", *RULES)):
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert "FAILED" not in done.stdout and "SUCCESS" in done.stdout


@needs_prometheus
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    cases = ROOT / "tests" / "deploy" / "alerts.yml"
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        check["alertname"]
        for case in yaml.safe_load(cases.read_text())["tests"]
        for check in case["alert_rule_test"]
        if check["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in _rules() if "alert" in rule}


def test_every_alert_has_its_section_in_the_documents() -> None:
    titles = {title.lower() for title in re.findall(r"^#+ (\S+)$", OPERATIONS.read_text(), re.MULTILINE)}
    for rule in _rules():
        if "alert" in rule:
            path, _, section = rule["annotations"]["runbook"].partition("#")
            assert (ROOT / path == OPERATIONS) and section == rule["alert"].lower() and section in titles
            assert rule["labels"]["severity"] in ("page", "ticket")


def test_every_rule_is_named_in_the_documents_or_is_an_alert() -> None:
    text = OPERATIONS.read_text()
    assert [rule["record"] for rule in _rules() if "record" in rule and rule["record"] not in text] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate(a:b:rate5m[5m] offset 15m)", "rate(a:b:rate5m[1500ms] offset 4500ms)"),
        ("for: 10m", "for: 3000ms"),
        ("p99_rate5m > 0.5", "p99_rate5m > 0.5"),
        ("[1d]", "[432000ms]"),
    ],
)
def test_time_runs_faster_in_rules_but_not_in_names(text: str, expected: str) -> None:
    assert faster(text, 200) == expected


def _rules() -> list[dict[str, object]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
