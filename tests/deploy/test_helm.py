"""The Helm chart: its parts fit each other, the settings and the images."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard import __version__
from guard.engine.config import KEY_FILE_ENV, SIGNED_ENV
from guard.engine.launch import guard_arguments
from service import first_start
from service.app import create_app
from service.settings import PREFIX, Settings, load_settings
from tests.deploy.chart import (
    CHART,
    EXAMPLES,
    RELEASE,
    ROOT,
    container,
    environment,
    helm,
    of_kind,
    refused,
    render,
    workloads,
)

ALL = ("--set", "monitoring.enabled=true", "--set", "signers.name=signers")
BOTH = ("gateway", "engine")
OWNED = {
    *("engine_url", "key_file", "policy_file", "host", "port", "metrics_port"),
    *("drain_delay", "shutdown_timeout", "require_signed_by"),
}
"""Settings that the chart decides by other values."""

each_example = pytest.mark.parametrize("example", sorted(EXAMPLES))
each_part = pytest.mark.parametrize("component", BOTH)


@each_example
def test_helm_finds_nothing_wrong_with_the_chart(example: str) -> None:
    done = helm("lint", "--strict", CHART, "-f", EXAMPLES[example])
    assert done.returncode == 0, done.stdout


def test_the_chart_is_of_this_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__
    objects = render("gpu")
    assert container(objects, "gateway")["image"] == f"neuronguard/gateway:{__version__}"
    assert container(objects, "engine")["image"] == f"neuronguard/engine-cuda:{__version__}"


@each_example
def test_every_object_has_the_common_labels(example: str) -> None:
    for each in render(example, *ALL, "--set", "commonLabels.team=safety"):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "neuronguard"
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/version"] == __version__
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["app.kubernetes.io/component"] in ("gateway", "engine", "monitoring")
        assert labels["team"] == "safety"


@each_part
def test_pods_are_hardened_and_limited(component: str) -> None:
    spec = workloads(render("gpu", *ALL))[component]["spec"]
    pod = container(render("gpu", *ALL), component)
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False  # a Service named vllm would set VLLM_PORT
    assert spec["securityContext"]["runAsNonRoot"] is True
    user = f"USER {spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}\n"
    assert user in (ROOT / "Dockerfile").read_text("utf-8")
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in pod["resources"]["limits"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    writable = [mount["name"] for mount in pod["volumeMounts"] if not mount.get("readOnly")]
    assert all("emptyDir" in volumes[name] for name in writable)
    assert {mount["name"] for mount in pod["volumeMounts"]} == volumes.keys()


@each_part
def test_secrets_are_named_and_only_their_group_can_read_them(component: str) -> None:
    objects = render("gpu", "--set", "secrets.keyRing.name=ring")
    assert not of_kind(objects, "Secret")
    spec = workloads(objects)[component]["spec"]
    volumes = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
    assert volumes.keys() == ({"key-ring", "policies"} if component == "gateway" else {"key-ring"})
    assert volumes["key-ring"]["secretName"] == "ring"
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    for secret in volumes.values():
        assert secret["defaultMode"] == 0o440  # guard.sealed refuses a file that others may read


def test_gateway_and_engine_read_one_key_ring() -> None:
    objects = render("gpu")
    options, rest = guard_arguments().parse_known_args(container(objects, "engine")["args"])
    assert options.key_file == environment(objects, "gateway")[KEY_FILE_ENV]
    assert rest[:2] == ["--config", "/etc/neuronguard/engine.yaml"]
    for component in BOTH:
        mounts = {each["name"]: each["mountPath"] for each in container(objects, component)["volumeMounts"]}
        (volume,) = [
            each for each in workloads(objects)[component]["spec"]["volumes"] if each["name"] == "key-ring"
        ]
        (item,) = volume["secret"]["items"]
        assert f"{mounts['key-ring']}/{item['path']}" == options.key_file


def settings_of(
    objects: tuple[dict[str, Any], ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """The settings that a rendered gateway starts with, its files in ``folder``."""
    config = of_kind(objects, "ConfigMap")["guarded-neuronguard-gateway"]["data"]["gateway.yaml"]
    (folder / "gateway.yaml").write_text(config)
    first_start.prepare(folder)
    for name, value in environment(objects, "gateway").items():
        value = value.replace("/run/secrets", str(folder)).replace("/etc/neuronguard", str(folder))
        monkeypatch.setenv(name, value.replace("/run/signers", str(folder)))
    return load_settings()


def test_the_gateway_starts_with_the_settings_of_the_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(
        "gpu", "--set", "gateway.settings.affinity=true", "--set", "gateway.settings.log_format=json"
    )
    settings = settings_of(objects, tmp_path, monkeypatch)
    assert (settings.host, settings.port, settings.metrics_port) == ("0.0.0.0", 8080, 9400)
    assert (settings.affinity, settings.log_format) == (True, "json")
    create_app(settings)  # key ring and policies are where the settings say


def test_every_variable_is_a_setting() -> None:
    """Settings do not complain about variables that they do not know."""
    objects = render("gpu", *ALL)
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {PREFIX + "CONFIG"}
    gateway = environment(objects, "gateway").keys()
    assert gateway <= known
    assert gateway == {PREFIX + name.upper() for name in OWNED} | {PREFIX + "CONFIG"}
    assert environment(objects, "engine").keys() == {SIGNED_ENV}


def test_the_schema_knows_the_settings() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    allowed = schema["properties"]["gateway"]["properties"]["settings"]["propertyNames"]["enum"]
    assert set(allowed) == Settings.model_fields.keys() - OWNED


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_gateway_has_an_address_for_each_engine(
    replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render("gpu", "--set", f"engine.replicas={replicas}")
    (engine,) = of_kind(objects, "StatefulSet").values()
    service = of_kind(objects, "Service")[engine["spec"]["serviceName"]]
    assert service["spec"]["clusterIP"] == "None"  # a name for each pod, and no balancing between them
    name, host = engine["metadata"]["name"], service["metadata"]["name"]
    assert settings_of(objects, tmp_path, monkeypatch).engines == tuple(
        f"http://{name}-{index}.{host}:8000" for index in range(replicas)
    )


def test_stopping_takes_as_long_as_draining_and_running_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render("gpu", "--set", "gateway.drainSeconds=12", "--set", "engine.drainSeconds=7")
    settings = settings_of(objects, tmp_path, monkeypatch)
    pods = {name: template["spec"] for name, template in workloads(objects).items()}
    assert settings.drain_delay == 12
    assert pods["gateway"]["terminationGracePeriodSeconds"] > settings.drain_delay + settings.shutdown_timeout
    ready = container(objects, "gateway")["readinessProbe"]
    assert settings.drain_delay > ready["periodSeconds"] * ready["failureThreshold"]

    engine = container(objects, "engine")
    command = engine["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["/bin/sh", "-c", "kill -USR1 1 && sleep 7"]
    assert settings.status_interval + settings.status_timeout < 7
    running = int(engine["args"][engine["args"].index("--shutdown-timeout") + 1])
    assert pods["engine"]["terminationGracePeriodSeconds"] > 7 + running


def test_a_gateway_goes_only_when_another_is_ready() -> None:
    (deployment,) = of_kind(render("gpu"), "Deployment").values()
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert container(render("gpu"), "gateway")["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container(render("gpu"), "engine")["readinessProbe"]["httpGet"]["path"] == "/guard/status"


def test_the_autoscaler_and_a_number_of_replicas_exclude_each_other() -> None:
    (deployment,) = of_kind(render("gpu"), "Deployment").values()
    (scaler,) = of_kind(render("gpu"), "HorizontalPodAutoscaler").values()
    assert "replicas" not in deployment["spec"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    off = render("gpu", "--set", "gateway.autoscaling.enabled=false", "--set", "gateway.replicas=5")
    assert not of_kind(off, "HorizontalPodAutoscaler")
    (deployment,) = of_kind(off, "Deployment").values()
    assert deployment["spec"]["replicas"] == 5


def test_other_settings_are_other_pods() -> None:
    def digests(*options: str) -> list[dict[str, str]]:
        return [each["metadata"]["annotations"] for each in workloads(render("gpu", *options)).values()]

    gateway, engine = digests()
    assert digests("--set", "gateway.settings.affinity=true")[0] != gateway
    assert digests("--set", "engine.config.max-model-len=1024")[1] != engine


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--set", "gateway.settings.status_intervall=1"], "status_intervall"),
        (["--set", "gateway.settings.port=1"], "port"),
        (["--set", "gateway.image.tg=1"], "tg"),
        (["--set", "engine.bundle="], "/engine/bundle"),
        (["--set", "engine.config.model="], "/engine/config/model"),
        (["--set", "engine.replicas=0"], "/engine/replicas"),
        (["--set", "engine.enabled=false"], "there is no engine to ask"),
        (["--set", "gateway.engineUrls={http://a}"], "set engine.enabled to false"),
        (["--set", "engine.enabled=false", "--set", "gateway.engineUrls={a:8000}"], "/gateway/engineUrls/0"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(options: list[str], why: str) -> None:
    assert why in refused("gpu", *options)


def test_the_lab_example_runs_what_compose_runs() -> None:
    config = of_kind(render("lab"), "ConfigMap")["guarded-neuronguard-engine"]["data"]["engine.yaml"]
    assert yaml.safe_load(config) == yaml.safe_load((ROOT / "deploy/engine/lab.yaml").read_text("utf-8"))
    compose = (ROOT / ".env").read_text("utf-8")
    (bundle,) = re.findall(r"^NEURONGUARD_BUNDLE=(.+)$", compose, re.M)
    assert bundle in container(render("lab"), "engine")["args"]
    assert "nvidia.com/gpu" not in container(render("lab"), "engine")["resources"]["limits"]


def test_the_package_holds_rules_and_dashboards(tmp_path: Path) -> None:
    """In the tree they are links to the one place where they are."""
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        found = {member.name for member in archive if member.isfile()}
    for folder, source in (("rules", "prometheus/rules/*.yml"), ("dashboards", "grafana/dashboards/*.json")):
        for path in (ROOT / "deploy").glob(source):
            assert f"neuronguard/files/{folder}/{path.name}" in found
    assert "neuronguard/values.schema.json" in found
