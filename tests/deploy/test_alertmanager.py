"""Alertmanager's configuration: valid, silent by default, with routes and inhibitions as they are meant."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.alerting import ALERTS, ROOT, load, rule_name, succeeds, tool

CONFIG = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
PACKAGE = "prometheus-alertmanager"
RECEIVERS = {"page": "page", "ticket": "ticket", "info": "nobody", "none": "watchdog"}
SEVERITIES = {rule["alert"]: rule["labels"]["severity"] for rule in ALERTS}
# About safety, not availability: nothing else explains them.
NEVER_INHIBITED = {
    *("GuardBypass", "GuardUnguardedAnswers", "GuardDirectTraffic", "GuardDirectivesRefused"),
    "GuardMissingVerdicts",
}
FAILING = {"GuardErrors", "GuardBackendErrors", "GuardSlowVerdicts"}
UNAVAILABLE = {
    *FAILING,
    "GuardRequestsFailing",
    "GuardSaturated",
    "GuardRefusalRateJump",
    "GuardRefusalRateDrop",
}


@pytest.fixture
def amtool() -> str:
    return tool("amtool", PACKAGE)


def test_the_configuration_is_valid(amtool: str) -> None:
    succeeds(amtool, "check-config", CONFIG)


def test_its_examples_are_valid(amtool: str, tmp_path: Path) -> None:
    examples = re.sub(r"^( *)#\| ", r"\1", CONFIG.read_text("utf-8"), flags=re.M)
    targets = {receiver["name"]: len(receiver) - 1 for receiver in yaml.safe_load(examples)["receivers"]}
    assert targets == {"nobody": 0, "page": 2, "ticket": 1, "watchdog": 1}
    (tmp_path / "alertmanager.yml").write_text(examples, "utf-8")
    succeeds(amtool, "check-config", tmp_path / "alertmanager.yml")


def test_nobody_is_told_by_default() -> None:
    assert all(receiver.keys() == {"name"} for receiver in load(CONFIG)["receivers"])


@pytest.mark.parametrize("rule", ALERTS, ids=rule_name)
def test_routes(amtool: str, rule: dict[str, Any]) -> None:
    labels = {"alertname": rule["alert"], **rule["labels"]}
    arguments = [f"{name}={value}" for name, value in labels.items()]
    said = succeeds(amtool, "config", "routes", "test", f"--config.file={CONFIG}", *arguments)
    assert said.strip() == RECEIVERS[rule["labels"]["severity"]]


def test_inhibition_names_alerts_that_exist() -> None:
    rules = load(CONFIG)["inhibit_rules"]
    matchers = [matcher for rule in rules for matcher in (*rule["source_matchers"], *rule["target_matchers"])]
    patterns = [found[1] for matcher in matchers if (found := re.fullmatch(r'alertname =~? "(.+)"', matcher))]
    names = {name for pattern in patterns for name in _alternatives(pattern)}
    assert names
    assert names <= SEVERITIES.keys()


def _alternatives(pattern: str) -> list[str]:
    """All names that a pattern of words, ``|`` and one level of groups stands for."""
    parts = re.findall(r"(\w*)\((.+?)\)|(\w+)", pattern)
    return [head + tail for head, group, word in parts for tail in (group or word).split("|")]


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[httpx.Client]:
    """A real Alertmanager under the committed configuration."""
    # Debian renames the program.
    binary = shutil.which("prometheus-alertmanager") or tool("alertmanager", PACKAGE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = (f"--storage.path={tmp_path}", f"--web.listen-address={address}", "--cluster.listen-address=")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen((binary, f"--config.file={CONFIG}", *flags), stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
                _wait_until_ready(client, tmp_path / "log")
                yield client
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(client: httpx.Client, log: Path) -> None:
    for _ in range(300):
        try:
            if client.get("/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"Alertmanager did not start: {log.read_text()}")


@pytest.mark.parametrize(
    ("pages", "inhibited"),
    [
        (["GuardGatewayDown", "GuardRequestsFailing"], UNAVAILABLE),
        (["GuardEngineDown", "GuardRequestsFailing"], {*UNAVAILABLE, "GuardScrapeFailed"}),
        (
            ["GuardBundleMismatch", "GuardEngineDown", "GuardRequestsFailing"],
            {*UNAVAILABLE, "GuardScrapeFailed", "GuardEngineDown", "GuardBundleMismatch"},
        ),
        (
            ["GuardRequestsFailing", "GuardBypass", "GuardUnguardedAnswers", "GuardDirectivesRefused"],
            FAILING,
        ),
    ],
)
def test_inhibition(alertmanager: httpx.Client, pages: list[str], inhibited: set[str]) -> None:
    """Some pages, and every ticket and info that there is."""
    assert inhibited.isdisjoint(NEVER_INHIBITED)
    fired = [(name, "page") for name in pages]
    fired += [
        (rule["alert"], severity) for rule in ALERTS if (severity := rule["labels"]["severity"]) != "page"
    ]
    where = {"job": "engine", "instance": "one", "backend": "engine:8000"}
    alerts = [{"labels": {"alertname": name, "severity": severity, **where}} for name, severity in fired]
    alertmanager.post("/api/v2/alerts", json=alerts).raise_for_status()
    deadline = time.monotonic() + 10
    while (found := _inhibited(alertmanager)) != inhibited and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == inhibited


def _inhibited(alertmanager: httpx.Client) -> set[str]:
    alerts = alertmanager.get("/api/v2/alerts").json()
    return {alert["labels"]["alertname"] for alert in alerts if alert["status"]["inhibitedBy"]}
