"""What the chart gives a Prometheus operator and Grafana: the rules and dashboards of the composition."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.alerting import RULE_FILES, load, succeeds, tool
from tests.deploy.chart import ROOT, chosen, of_kind, render

ON = ("--set", "monitoring.enabled=true")
SAME = tuple(
    part
    for job in ("gateway", "engine", "prometheus", "alertmanager")
    for part in ("--set", f"monitoring.jobs.{job}={job}")
)
"""Jobs named as in the composition."""

# Fields of monitoring.coreos.com/v1 that the chart uses; an operator drops others without a word.
GROUP = {"name", "rules", "interval"}
RULE = {"alert", "record", "expr", "for", "labels", "annotations"}
MONITOR = {"selector", "endpoints"}
ENDPOINT = {"port", "path", "interval", "relabelings"}


def groups(*options: str) -> dict[str, list[dict[str, Any]]]:
    rules = of_kind(render("gpu", *ON, *options), "PrometheusRule")
    return {name: each["spec"]["groups"] for name, each in rules.items()}


def test_without_monitoring_no_object_of_the_operator_is_made() -> None:
    assert {each["apiVersion"] for each in render("gpu")} == {
        *("v1", "apps/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1")
    }


def test_the_rules_are_those_of_the_composition() -> None:
    found = groups(*SAME)
    assert len(found) == len(RULE_FILES)
    for path in RULE_FILES:
        assert found[f"guarded-neuronguard-{path.stem}"] == load(path)["groups"]


def test_only_names_of_jobs_differ_and_all_of_them_do() -> None:
    ours, theirs = yaml.safe_dump(groups()), yaml.safe_dump(groups(*SAME))
    named = {"neuronguard-gateway", "neuronguard-engine"}
    outside = {"kube-prometheus-stack-prometheus", "kube-prometheus-stack-alertmanager"}

    def jobs(text: str) -> set[str]:
        found = re.findall(r"\bjob(?:=|!=|=~|!~)\\?\"([^\"\\]+)", text)
        return {job for names in found for job in names.split("|")}

    assert jobs(theirs) == {"gateway", "engine", "prometheus", "alertmanager"}
    assert jobs(ours) == named | outside
    for job in jobs(ours):
        ours = ours.replace(job, job.rpartition("-")[2])
    assert yaml.safe_load(ours) == yaml.safe_load(theirs)


def test_the_rules_are_valid(tmp_path: Path) -> None:
    promtool = tool("promtool", "prometheus")
    for name, found in groups().items():
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump({"groups": found}))
        succeeds(promtool, "check", "rules", "--lint=all", "--lint-fatal", path)


def test_the_operator_knows_every_field() -> None:
    for found in groups().values():
        for group in found:
            assert group.keys() <= GROUP
            assert all(rule.keys() <= RULE for rule in group["rules"])
    for monitor in of_kind(render("gpu", *ON), "ServiceMonitor").values():
        assert monitor["spec"].keys() <= MONITOR
        assert all(endpoint.keys() <= ENDPOINT for endpoint in monitor["spec"]["endpoints"])


def test_each_component_is_scraped_once_under_the_job_of_the_rules() -> None:
    objects = render("gpu", *ON)
    scraped = {}
    for monitor in of_kind(objects, "ServiceMonitor").values():
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [
            each
            for each in of_kind(objects, "Service").values()
            if wanted <= each["metadata"]["labels"].items()
        ]
        (component,) = chosen(service["spec"]["selector"], objects)
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        (relabelling,) = endpoint["relabelings"]
        assert relabelling["targetLabel"] == "job"
        scraped[component] = relabelling["replacement"]
        # A gateway or engine that is not ready is when its metrics matter.
        assert service["spec"]["publishNotReadyAddresses"] is True
    assert scraped == {"gateway": "neuronguard-gateway", "engine": "neuronguard-engine"}


def test_the_dashboards_are_those_of_the_composition() -> None:
    (found,) = [
        each
        for each in of_kind(render("gpu", *ON), "ConfigMap").values()
        if "dashboards" in each["metadata"]["name"]
    ]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    source = {
        path.name: path.read_text("utf-8") for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")
    }
    assert found["data"] == source


def test_prometheus_chooses_by_labels_that_can_be_changed() -> None:
    objects = render("gpu", *ON, "--set", "monitoring.labels.release=prom")
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert all(
            each["metadata"]["labels"]["release"] == "prom" for each in of_kind(objects, kind).values()
        )
