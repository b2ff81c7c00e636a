"""Selectors and ports of the chart, and who reaches whom: only gateways and Prometheus reach vLLM."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.deploy.chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    chosen,
    container,
    helm,
    of_kind,
    reaches,
    render,
    workloads,
)

BOTH = ("gateway", "engine")


@pytest.mark.parametrize(
    "kind", ["Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"]
)
def test_selectors_choose_the_pods_of_their_component_and_no_others(kind: str) -> None:
    objects = render("gpu")
    found = of_kind(objects, kind)
    assert found
    for each in found.values():
        spec = each["spec"]
        selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
        labels = selector.get("matchLabels", selector)
        assert chosen(labels, objects) == {each["metadata"]["labels"]["app.kubernetes.io/component"]}
        assert labels["app.kubernetes.io/instance"] == RELEASE  # another release's pods are not ours


def test_two_releases_in_one_namespace_share_no_name() -> None:
    other = helm("template", "second", CHART, "-n", NAMESPACE, "-f", EXAMPLES["gpu"])
    names = {(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(other.stdout) if each}
    assert not names & {(each["kind"], each["metadata"]["name"]) for each in render("gpu")}


def test_ports_are_named_where_they_are_used() -> None:
    objects = render("gpu")
    for service in of_kind(objects, "Service").values():
        (component,) = chosen(service["spec"]["selector"], objects)
        ports = {port["name"] for port in container(objects, component)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for component in BOTH:
        pod = container(objects, component)
        ports = {port["name"] for port in pod["ports"]}
        probes = [pod[name]["httpGet"]["port"] for name in pod if name.endswith("Probe")]
        assert len(probes) >= 2
        assert set(probes) <= ports


class TestNetwork:
    PROMETHEUS = ({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})

    def gateway(self) -> dict[str, str]:
        return workloads(render("gpu"))["gateway"]["metadata"]["labels"]

    def test_gateways_and_prometheus_reach_the_engine(self) -> None:
        assert reaches(render("gpu"), self.gateway(), None, "engine", 8000)
        assert reaches(render("gpu"), *self.PROMETHEUS, "engine", 8000)

    @pytest.mark.parametrize(
        ("change", "namespace"),
        [
            pytest.param({"app.kubernetes.io/component": "client"}, None, id="a client"),
            pytest.param({"app.kubernetes.io/instance": "other"}, None, id="another release's gateway"),
            pytest.param({}, {"kubernetes.io/metadata.name": "other"}, id="another namespace's gateway"),
            pytest.param({}, {"kubernetes.io/metadata.name": "monitoring"}, id="not Prometheus"),
            pytest.param({"app.kubernetes.io/name": "prometheus"}, None, id="not the monitoring namespace"),
        ],
    )
    def test_nobody_else_does(self, change: dict[str, str], namespace: dict[str, str] | None) -> None:
        assert not reaches(render("gpu"), self.gateway() | change, namespace, "engine", 8000)

    def test_no_other_port_of_the_engine_is_open(self) -> None:
        assert not reaches(render("gpu"), self.gateway(), None, "engine", 8001)

    def test_the_engine_reaches_nobody(self) -> None:
        spec = of_kind(render("gpu"), "NetworkPolicy")["guarded-neuronguard-engine"]["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["egress"] == []

    def test_clients_reach_the_api_and_not_the_metrics(self) -> None:
        client = ({"app": "client"}, {"kubernetes.io/metadata.name": "apps"})
        assert reaches(render("gpu"), *client, "gateway", 8080)
        assert not reaches(render("gpu"), *client, "gateway", 9400)
        assert reaches(render("gpu"), *self.PROMETHEUS, "gateway", 9400)

    def test_clients_can_be_named(self) -> None:
        allowed = json.dumps([{"podSelector": {"matchLabels": {"app": "client"}}}])
        objects = render("gpu", "--set-json", f"networkPolicy.clients={allowed}")
        assert reaches(objects, {"app": "client"}, None, "gateway", 8080)
        assert not reaches(objects, {"app": "other"}, None, "gateway", 8080)

    def test_engines_of_another_chart_are_closed_in_the_same_way(self) -> None:
        policies = of_kind(render("external-engines"), "NetworkPolicy")
        (spec,) = [each["spec"] for name, each in policies.items() if name.endswith("-engine")]
        values = yaml.safe_load(EXAMPLES["external-engines"].read_text("utf-8"))
        assert spec["podSelector"]["matchLabels"] == values["networkPolicy"]["externalEngines"]
        own = of_kind(render("gpu"), "NetworkPolicy")["guarded-neuronguard-engine"]["spec"]
        assert spec["ingress"] == own["ingress"]
