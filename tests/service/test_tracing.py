"""Traces: a client's goes on to the engine, and spans reach a collector, with nothing of a prompt in them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.app import create_app
from service.errors import ConfigError
from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, HARMFUL, MODEL, SECRET, FakeEngine
from tests.service.test_audit import CANARY, KEY, one_of_each
from tests.service.world import serving, settings_for, world

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector:
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.raw.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    @property
    def spans(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for body in self.raw:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.setdefault(span.name, []).append(span)
        return found


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Collector, str]]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Collector()
    with serving(made) as url:
        yield made, f"{url}/v1/traces"


async def test_a_request_and_its_verdict_are_spans_of_the_clients_trace(
    collector: tuple[Collector, str], tmp_path: Path
) -> None:
    kept, url = collector
    async with world(tmp_path, otlp_endpoint=url) as w:
        for body in (CHAT, BAD_CHAT):
            assert (await w.client.post(CHATS, json=body, headers=SENT)).status_code == 200
        at_engine = [seen.headers["traceparent"] for seen in w.engine.seen]
    spans = kept.spans
    requests, verdicts = spans[f"POST {CHATS}"], spans["guard.verdict"]
    assert {span.trace_id.hex() for span in (*requests, *verdicts)} == {TRACE}
    assert {span.parent_span_id.hex() for span in requests} == {PARENT}
    assert {span.parent_span_id for span in verdicts} == {span.span_id for span in requests}
    assert [f"00-{TRACE}-{span.span_id.hex()}-01" for span in verdicts] == at_engine
    assert attributes(requests[0]) == {"http.route": CHATS, "http.response.status_code": 200}
    assert attributes(verdicts[1]) == {
        "guard.policy": "default",
        "guard.mode": "enforce",
        "guard.verdict": "refuse",
        "guard.action": "refuse",
        "guard.bundle": "b" * 64,
        "gen_ai.request.model": MODEL,
        "server.address": "127.0.0.1:8001",
    }
    everything = b"".join(kept.raw)
    assert HARMFUL.encode() not in everything
    assert SECRET.encode() not in everything


async def test_no_prompt_answer_or_key_is_in_any_span(
    collector: tuple[Collector, str], tmp_path: Path
) -> None:
    kept, url = collector
    async with world(tmp_path, otlp_endpoint=url) as w:
        await one_of_each(w)
    statuses = {
        attributes(span)["http.response.status_code"]
        for each in kept.spans.values()
        for span in each
        if "http.response.status_code" in attributes(span)
    }
    assert statuses >= {200, 400, 404, 502, 503}
    for text in (CANARY, KEY, SECRET):
        assert text.encode() not in b"".join(kept.raw)


async def test_failures_are_in_the_trace(collector: tuple[Collector, str], tmp_path: Path) -> None:
    kept, url = collector
    async with world(tmp_path, otlp_endpoint=url) as w:
        w.engine.seal = lambda verdict: None
        await w.client.post(CHATS, json=CHAT)
        await w.client.post("/v1/nothing", json=CHAT)
        await w.client.get("/readyz")
    spans = kept.spans
    assert attributes(spans["guard.verdict"][0])["error.type"] == "guard_no_verdict"
    assert attributes(spans[f"POST {CHATS}"][0])["http.response.status_code"] == 503
    assert set(spans) == {f"POST {CHATS}", "guard.verdict", "POST unknown"}


async def test_a_collector_that_is_away_costs_no_answer(tmp_path: Path) -> None:
    async with world(tmp_path, otlp_endpoint="http://127.0.0.1:9/v1/traces") as w:
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("sent", "goes_on"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-01\t", False),
        (f"01-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        ("anything", False),
    ],
)
async def test_without_a_collector_a_sound_traceparent_goes_on(
    sent: str, goes_on: bool, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        await w.client.post(CHATS, json=CHAT, headers={"traceparent": sent.strip() if goes_on else sent})
        assert w.engine.seen[0].headers.get("traceparent") == (sent if goes_on else None)


def test_without_the_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"install neuronguard\[otlp\]"):
        create_app(settings_for(FakeEngine(), tmp_path, otlp_endpoint="http://c/v1/traces"))
