import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from service.audit import AuditRecord
from tests.service.world import CHAT, MODEL, SECRET, World, world

CANARY = "canary-in-the-prompt"
KEY = "sk-canary-key"
ALLOWED = {field.name for field in fields(AuditRecord)}


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "neuronguard.audit"]


@pytest.fixture(autouse=True)
def _capture(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("httpx", "httpcore"):  # the client of the test logs its own requests through these
        caplog.set_level(logging.WARNING, logger=name)
    caplog.set_level(logging.DEBUG)


async def one_of_each(w: World) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-guard-note": CANARY, "cookie": CANARY}

    async def post(path: str, body: Any) -> None:
        await w.client.post(path, json=body, headers=headers, params={"q": CANARY})

    message = {"role": "user", "content": CANARY}
    chat = CHAT | {"messages": [message], "user": CANARY, "metadata": {"k": CANARY}}
    await post("/v1/chat/completions", chat)
    await post("/v1/chat/completions", chat | {"stream": True})
    await post("/v1/chat/completions", chat | {"messages": [message | {"content": CANARY + " bomb"}]})
    await post("/v1/chat/completions", chat | {"model": CANARY})
    await post("/v1/chat/completions", chat | {CANARY: CANARY})
    await post("/v1/chat/completions", chat | {"temperature": CANARY})
    await post("/v1/completions", {"model": MODEL, "prompt": CANARY})
    await post("/v1/moderations", {"input": CANARY})
    await post(f"/v1/{CANARY}", {})
    await w.client.get(f"/v1/models/{CANARY}", headers=headers)
    w.engine.error = (500, {"error": {"message": CANARY, "code": 500}})
    await post("/v1/chat/completions", chat)
    w.engine.error = None
    w.engine.seal = lambda verdict: CANARY
    await post("/v1/chat/completions", chat)
    w.engine.seal = lambda verdict: verdict.seal(w.engine.keys)
    w.engine.answer = CANARY.encode()
    await post("/v1/chat/completions", chat)


async def test_no_prompt_answer_or_key_is_ever_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        await one_of_each(w)
        exported = (await w.client.get("/metrics")).text
    lines = audited(caplog)
    assert len(lines) == 13
    assert all(set(line) == ALLOWED for line in lines)
    for text in (CANARY, KEY, SECRET):
        assert text not in caplog.text
        assert text not in exported


async def test_one_line_for_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "r-1"})
        assert response.status_code == 200
        upstream_id = w.engine.seen[0].headers["x-request-id"]
    (line,) = audited(caplog)
    expected = {
        "request_id": "r-1",
        "upstream_id": upstream_id,
        "route": "/v1/chat/completions",
        "policy": "default",
        "mode": "enforce",
        "model": MODEL,
        "stream": False,
        "verdict": "pass",
        "action": "pass",
        "probability": None,
        "status": 200,
        "code": None,
        "outcome": "complete",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "tenant": None,
        "bundle": "b" * 64,
    }
    assert {name: line[name] for name in expected} == expected
    assert line["total_seconds"] > 0


async def test_the_probability_is_written_only_if_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, audit_scores=True) as w:
        await w.client.post("/v1/chat/completions", json=CHAT)
    assert audited(caplog)[0]["probability"] == 0.01


async def test_a_stream_that_breaks_off_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        w.engine.stream = [b'data: {"choices": []}\n\n']
        await w.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    (line,) = audited(caplog)
    assert (line["outcome"], line["status"], line["code"]) == ("interrupted", 200, "upstream_interrupted")


async def test_operators_routes_are_not_audited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            await w.client.get(path)
    assert audited(caplog) == []
