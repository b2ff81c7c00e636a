"""A real Prometheus with the committed configuration against the real gateway and engine.

Every query of every dashboard and every rule must return data from it, so that a metric or label that is
renamed on one side only is an error here and not an empty panel or a silent alert.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from deploy.dashboards.queries import concrete, queries
from guard.sealed import Keyring
from guard.verdict import DIRECTIVE_HEADER, Decision, Directive
from tests.e2e import servers
from tests.e2e.prometheus import (
    ALERTMANAGER,
    DEPLOY,
    PROMETHEUS,
    RULES,
    Prometheus,
    alertmanager,
    eventually,
    prometheus,
)
from tests.e2e.promql import Probe, probes, recent, unconditional
from tests.e2e.servers import API_KEYS, Stack

pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="there is no `prometheus` in PATH (Debian's package `prometheus`)"
)

ROUNDS = 10
PAUSE = 2.0
"""Seconds between rounds: rates need traffic in most of the windows below."""
WINDOWS = {"rate_interval": "20s", "range_": "1m"}

TAGGING = "tagging"

PASSED = 'guard_requests_total{action="pass",mode="enforce"}'
REFUSED = 'guard_requests_total{action="refuse"}'
STREAMED = 'guard_requests_total{action="refuse",stream="true"}'
OBSERVED = 'guard_requests_total{action="pass",verdict="refuse",mode="observe"}'
TAGGED = 'guard_requests_total{action="tag"}'
CHECKED = 'guard_requests_total{action="checked"}'
SENT = {
    # In each round two passed, three refused, one tagged, one observed, two checked, and three that fail.
    PASSED: 2 * ROUNDS,
    REFUSED: 3 * ROUNDS,
    STREAMED: 2 * ROUNDS,
    OBSERVED: ROUNDS,
    TAGGED: ROUNDS,
    CHECKED: 2 * ROUNDS,
    "guard_score_count": 9 * ROUNDS,
    'guard_errors_total{stage="auth"}': ROUNDS,
    'guard_errors_total{stage="request"}': ROUNDS,
    'guard_errors_total{stage!~"auth|request"}': 0,
    "guard_bypass_total": 0,
    'guard_engine_verdicts_total{source="direct"}': ROUNDS,
    'guard_engine_verdicts_total{source="gateway"}': 9 * ROUNDS,
    "guard_engine_directive_errors_total": 1,
    "guard_engine_missing_verdicts_total": 0,
}


@dataclass(frozen=True)
class Monitored:
    """A Prometheus that has seen some traffic from its first request to its last."""

    prometheus: Prometheus
    alertmanager: str
    before: dict[str, float]
    ended: float
    """Unix time."""


@dataclass(frozen=True)
class Traffic:
    """One client of everything; ``refused`` and ``passed`` are messages by the tiny model's own lights."""

    stack: Stack
    refused: str
    passed: str

    def round(self) -> None:
        """Send what ``SENT`` counts, the forged directive aside."""
        with self._client("message") as client:
            for text in (self.refused, self.passed):
                client.chat.completions.create(**self._chat(text))
                list(client.chat.completions.create(**self._chat(text), stream=True))
            client.moderations.create(model="tiny", input=[self.refused, self.passed])
        with self._client("content_filter") as client:
            list(client.chat.completions.create(**self._chat(self.refused), stream=True))
        for name in ("observe", TAGGING):
            with self._client(name) as client:
                client.chat.completions.create(**self._chat(self.refused))
        with self._client("none") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**self._chat(self.passed))
        with self._client("message") as client, pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**self._chat(self.passed), extra_body={"cache_salt": "x"})
        direct = httpx.post(
            f"{self.stack.engine}/v1/chat/completions", json=self._chat(self.passed), timeout=60.0
        )
        assert direct.status_code == 200

    def forge(self) -> None:
        """Send the engine a directive that is signed with a key of somebody else's."""
        body = json.dumps(self._chat(self.refused)).encode()
        order = Decision(policy="forged", rules=())
        directive = Directive.issue(order, audience="engine", body=body).seal(Keyring.generate())
        headers = {"content-type": "application/json", DIRECTIVE_HEADER: directive}
        answer = httpx.post(f"{self.stack.engine}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400

    def _client(self, name: str) -> openai.OpenAI:
        key = f"sk-test-{name}"
        return openai.OpenAI(base_url=f"{self.stack.gateway}/v1", api_key=key, max_retries=0)

    @staticmethod
    def _chat(text: str) -> dict[str, Any]:
        return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8}


@pytest.fixture(scope="module")
def tagging_stack(stack: Stack, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway of our own before the shared engine, with one more policy: dashboards show tags as well."""
    folder = tmp_path_factory.mktemp("tagging")
    key = {"sha256": hashlib.sha256(f"sk-test-{TAGGING}".encode()).hexdigest()}
    tag = {"rules": [{"above": 1.0, "action": "refuse"}, {"above": 0.0, "action": "tag"}]}
    served: dict[str, Any] = servers.POLICIES
    policies = {
        "policies": {**served["policies"], TAGGING: tag},
        "keys": [*served["keys"], {**key, "tenant": "tests", "policy": TAGGING}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "POLICIES", policies)
        with servers.gateway(stack.engine, key_file, folder) as gateway:
            yield replace(stack, gateway=gateway)


@pytest.fixture(scope="module")
def traffic(tagging_stack: Stack, everyday: list[str]) -> Traffic:
    stack = tagging_stack
    inputs = everyday[:32]
    answer = httpx.post(
        f"{stack.gateway}/v1/moderations",
        json={"model": "tiny", "input": inputs},
        headers={"authorization": f"Bearer {API_KEYS['scored']}"},
        timeout=60.0,
    ).json()
    scores = [max(result["category_scores"].values()) for result in answer["results"]]
    ordered = sorted(zip(scores, inputs, strict=True))
    assert ordered[0][0] < 0.5 < ordered[-1][0]
    return Traffic(stack, refused=ordered[-1][1], passed=ordered[0][1])


@pytest.fixture(scope="module")
def monitored(traffic: Traffic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("prometheus")
    gateway, engine = (url.removeprefix("http://") for url in (traffic.stack.gateway, traffic.stack.engine))
    with (
        alertmanager(folder) as receiver,
        prometheus(gateway, engine, receiver, folder) as server,
    ):
        eventually(lambda: len(server.query("up")) == 4, "all targets are scraped", 20.0)
        server.scraped()
        before = {name: server.total(name) for name in SENT}
        for number in range(ROUNDS):
            started = time.monotonic()
            traffic.round()
            if number == ROUNDS // 2:
                traffic.forge()
            time.sleep(max(0.0, PAUSE - (time.monotonic() - started)))
        server.scraped()
        yield Monitored(server, receiver, before, time.time())


def rules(kind: str) -> Iterator[tuple[str, str]]:
    """``(name, expression)`` of every ``record`` or ``alert`` in the rule files."""
    for file in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(file.read_text("utf-8"))["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield rule[kind], rule["expr"]


def missing(monitored: Monitored, wanted: Iterable[tuple[str, str]]) -> list[str]:
    """One line for every part of every ``(name, expression)`` without a finite value or a label it needs."""
    lines: dict[str, None] = {}
    for name, expr in wanted:
        for probe in dict.fromkeys(probes(expr)):
            if why := _lacks(monitored, probe):
                lines[f"{name}: {why}: {probe.expr}"] = None
    return list(lines)


def _lacks(monitored: Monitored, probe: Probe) -> str:
    try:
        found = monitored.prometheus.query(probe.expr, monitored.ended)
    except AssertionError as error:
        return str(error)
    if not found:
        return "no data"
    if not any(math.isfinite(series.value) for series in found):
        return "no finite value"
    if not any(probe.labels <= series.labels.keys() for series in found):
        return f"no series has {', '.join(sorted(probe.labels))}"
    return ""


def test_targets_are_up(monitored: Monitored) -> None:
    wanted = dict.fromkeys(("gateway", "engine", "prometheus", "alertmanager"), "up")
    if ALERTMANAGER is None:
        wanted["alertmanager"] = "down"
    assert monitored.prometheus.health() == wanted


def test_prometheus_has_counted_what_was_sent(monitored: Monitored) -> None:
    counted = {name: monitored.prometheus.total(name) - monitored.before[name] for name in SENT}
    assert counted == SENT


STOPS = ("Answers stopped", "Tokens until a stop")
"""Panels that are empty here: the bundle of this stack watches no answers."""


@pytest.mark.parametrize("name", ["guard-overview", "engine"])
def test_every_query_of_a_dashboard_has_data(monitored: Monitored, name: str) -> None:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text("utf-8"))
    wanted = []
    for query in queries(board):
        expr = recent(concrete(query.expr, **WINDOWS))
        # Annotations mark events with ``unless``; they have data at those only, like alerts.
        if query.panel.startswith("annotation "):
            expr = unconditional(expr)
        if query.panel.startswith(STOPS):
            monitored.prometheus.query(expr, monitored.ended)  # Prometheus takes it; nothing was stopped
            continue
        wanted.append((query.panel, expr))
    assert len(wanted) > 20
    lines = missing(monitored, wanted)
    assert not lines, "\n" + "\n".join(lines)


def test_every_recording_rule_has_data(monitored: Monitored) -> None:
    recorded = list(rules("record"))
    assert len(recorded) > 10
    lines = missing(monitored, [(name, recent(expr)) for name, expr in recorded])
    lines += missing(monitored, [(name, name) for name, _ in recorded])
    assert not lines, "\n" + "\n".join(lines)


def test_every_alert_asks_for_what_exists(monitored: Monitored) -> None:
    alerts = list(rules("alert"))
    assert len(alerts) > 10
    lines = missing(monitored, [(name, unconditional(recent(expr))) for name, expr in alerts])
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "expr",
    [
        "sum by (job) (increase(guard_bypas_total[10m])) > 0",
        'sum by (job) (increase(guard_errors_total{stage="verdcit"}[10m])) > 0',
        'sum by (job) (increase(guard_errors_total{stage=~"guard|verdcit"}[10m])) > 0',
        "sum by (job, raeson) (increase(guard_bypass_total[10m])) > 0",
        'up{job="gateway"} == 0 or absent(up{job="gatewya"})',
        "guard_upstream_up == 0 or guard_upstream_down == 1",
        "guard_upstream_up == 0 and vllm:num_requests_waiting > 0",
        "guard_upstream_up == 0 and on (jobb) guard_inflight_requests > 1",
        "sum(guard_bypass_total or guard_bypas_total) > 0",
        "0 / guard_bypass_total > 1 and guard_bypass_total",
    ],
)
def test_a_slip_in_an_alert_is_noticed(monitored: Monitored, expr: str) -> None:
    """A wrong metric, value or label, operands that never match: each is an alert that never fires."""
    assert missing(monitored, [("slip", unconditional(expr))])


def test_rules_are_evaluated_without_error(monitored: Monitored) -> None:
    evaluated = monitored.prometheus.rules()
    assert len(evaluated) == len(list(rules("record"))) + len(list(rules("alert")))
    assert [(r["name"], r["health"], r.get("lastError")) for r in evaluated if r["health"] != "ok"] == []


def test_the_forged_directive_and_direct_traffic_raise_alerts_and_nothing_else_does(
    monitored: Monitored,
) -> None:
    expected = {"GuardWatchdog", "GuardDirectivesRefused", "GuardDirectTraffic"}
    eventually(lambda: monitored.prometheus.alerts() >= expected, f"{expected} fire", 20.0)
    assert monitored.prometheus.alerts() == expected
    for alert in monitored.prometheus.get("alerts")["alerts"]:
        said = " ".join(alert["annotations"].values())
        assert "error expanding template" not in said, alert
        assert "<no value>" not in said, alert


@pytest.mark.skipif(
    ALERTMANAGER is None, reason="there is no Alertmanager (Debian's `prometheus-alertmanager`)"
)
@pytest.mark.parametrize(
    ("alert", "receiver"),
    [("GuardWatchdog", "watchdog"), ("GuardDirectivesRefused", "page"), ("GuardDirectTraffic", "ticket")],
)
def test_alerts_arrive_at_their_receivers(monitored: Monitored, alert: str, receiver: str) -> None:
    ask = partial(
        httpx.get,
        f"http://{monitored.alertmanager}/api/v2/alerts",
        params={"filter": f'alertname="{alert}"', "active": "true"},
    )
    eventually(lambda: bool(ask().json()), f"{alert} arrives", 20.0)
    (arrived,) = ask().json()
    assert [one["name"] for one in arrived["receivers"]] == [receiver]
    assert arrived["status"]["state"] == "active"
