"""Prometheus' configuration and rules, as far as they can be checked without targets.

``promtool`` decides whether files are valid and whether rules do what their unit tests say. What it cannot
know is checked here: that every metric, label and label value exists in the code, that every alert has unit
tests of both kinds, and that it has a runbook.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import guard.engine.metrics
from guard.sealed import SEAL_ERRORS
from guard.verdict import DIRECTIVE_ERRORS, SEVERITY, VERDICT_ERRORS
from service.errors import STAGES
from service.metrics import Metrics
from tests.deploy.alerting import ALERTS, PROMETHEUS, ROOT, RULE_FILES, RULES, load, rule_name, succeeds, tool

UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
CASES: list[dict[str, Any]] = [case for path in UNIT_TESTS for case in load(path)["tests"]]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
GUIDE = ROOT / "docs" / "operations.md"
TARGETS = {
    "gateway": ["gateway:9400"],
    "engine": ["engine:8000"],
    "prometheus": ["localhost:9090"],
    "alertmanager": ["alertmanager:9093"],
}
SCRAPE_INTERVAL = timedelta(seconds=15)

# vLLM is not imported here: names in vllm/v1/metrics/loggers.py of 0.32, and their labels.
VLLM = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:request_queue_time_seconds_bucket", "vllm:request_prefill_time_seconds_bucket"),
}
VLLM_LABELS = {"model_name", "engine", "le"}
VALUES: dict[str, set[str]] = {
    "job": set(TARGETS),
    "stage": set(STAGES),
    "outcome": {"closed", "open"},
    "reason": {*SEAL_ERRORS, *DIRECTIVE_ERRORS, *VERDICT_ERRORS},
    "verdict": {"pass", "tag", "refuse", "none"},
    "action": {*SEVERITY, "none", "unguarded"},
    "mode": {"enforce", "observe", "check"},
    "source": {"gateway", "direct"},
    "on_missing_verdict": {"closed", "open"},
    "class": {"benign", "harmful"},
}

each_rule = pytest.mark.parametrize("rule", RULES, ids=rule_name)
each_alert = pytest.mark.parametrize("rule", ALERTS, ids=rule_name)


@pytest.fixture
def promtool() -> str:
    return tool("promtool", "prometheus")


def _exported() -> dict[str, set[str]]:
    """Every series that the rules may read, with its labels."""
    gateway = vars(Metrics(CollectorRegistry())).values()
    engine = vars(guard.engine.metrics).values()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    found: dict[str, set[str]] = {"up": set(), **dict.fromkeys(VLLM, VLLM_LABELS)}
    for metric in (*gateway, *engine):
        if isinstance(metric, MetricWrapperBase):
            family = next(iter(metric.describe()))
            for suffix in suffixes[family.type]:
                found[family.name + suffix] = {*metric._labelnames, *(["le"] * (suffix == "_bucket"))}
    return {name: labels | {"job", "instance"} for name, labels in found.items()}


def _nodes(expr: str, kind: type) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expr), found.append)
    return [node for node in found if isinstance(node, kind)]


def _anchors() -> Counter[str]:
    """Anchors of the guide's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ +(.+?) *$", GUIDE.read_text("utf-8"), re.M)
    return Counter(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_the_configuration_is_valid(promtool: str, tmp_path: Path) -> None:
    text = (PROMETHEUS / "prometheus.yml").read_text("utf-8")
    assert text.count("/etc/prometheus/rules/") == 1  # where the container has them
    (tmp_path / "prometheus.yml").write_text(
        text.replace("/etc/prometheus/rules", str(PROMETHEUS / "rules")), "utf-8"
    )
    said = succeeds(promtool, "check", "config", "--lint-fatal", tmp_path / "prometheus.yml")
    assert f"{len(RULE_FILES)} rule files found" in said


def test_targets_and_intervals() -> None:
    config = load(PROMETHEUS / "prometheus.yml")
    assert config["global"]["scrape_interval"] == config["global"]["evaluation_interval"] == "15s"
    targets = {
        job["job_name"]: [target for group in job["static_configs"] for target in group["targets"]]
        for job in config["scrape_configs"]
    }
    assert targets == TARGETS


def test_rules_are_valid(promtool: str) -> None:
    succeeds(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_rules_do_what_their_unit_tests_say(promtool: str, path: Path) -> None:
    succeeds(promtool, "test", "rules", path)


def _reads_what_exists(expr: str) -> None:
    exported = _exported()
    for selector in _nodes(expr, promql_parser.VectorSelector):
        assert selector.name in exported.keys() | RECORDED
        for matcher in selector.matchers.matchers:
            assert matcher.name in exported[selector.name]
            assert set(matcher.value.split("|")) <= VALUES[matcher.name]


@each_rule
def test_every_series_label_and_value_exists(rule: dict[str, Any]) -> None:
    _reads_what_exists(rule["expr"])


@pytest.mark.parametrize("query", re.findall(r"^ *q '(.+)'", GUIDE.read_text("utf-8"), re.M))
def test_queries_in_the_guide_read_what_exists(query: str) -> None:
    _reads_what_exists(query)


@each_rule
def test_windows_hold_four_scrapes_at_least(rule: dict[str, Any]) -> None:
    windows = [node.range for node in _nodes(rule["expr"], promql_parser.MatrixSelector)]
    assert all(window >= 4 * SCRAPE_INTERVAL for window in windows)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_every_recorded_series_has_a_good_name_and_a_unit_test(name: str) -> None:
    assert re.fullmatch(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+", name), "level:metric:operations"
    checks = [check for case in CASES for check in case.get("promql_expr_test", ()) if check["exp_samples"]]
    tested = [node for check in checks for node in _nodes(check["expr"], promql_parser.VectorSelector)]
    assert name in {selector.name for selector in tested}


@each_alert
def test_every_alert_says_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket", "info", "none"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert all(rule["annotations"].values())


@each_alert
def test_every_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    prefix, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert prefix == "{{ with $externalLabels.runbooks }}{{ . }}{{ else }}docs/operations.md{{ end }}"
    assert anchor == rule["alert"].lower()
    assert _anchors()[anchor] == 1


def test_links_within_the_guide_lead_somewhere() -> None:
    links = set(re.findall(r"\]\(#([^)]+)\)", GUIDE.read_text("utf-8")))
    assert links
    assert links <= _anchors().keys()


def test_rules_of_one_alert_differ_in_their_labels() -> None:
    seen = Counter((rule["alert"], *sorted(rule["labels"].items())) for rule in ALERTS)
    assert set(seen.values()) == {1}


@each_alert
def test_every_alert_has_a_unit_test_that_fires_it_and_one_that_does_not(rule: dict[str, Any]) -> None:
    fires = {
        any(rule["labels"].items() <= expected["exp_labels"].items() for expected in check["exp_alerts"])
        for case in CASES
        for check in case.get("alert_rule_test", ())
        if check["alertname"] == rule["alert"]
    }
    assert fires == ({True} if rule["alert"] == "GuardWatchdog" else {True, False})
