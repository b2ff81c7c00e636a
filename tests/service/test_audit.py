import asyncio
import hashlib
import hmac
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from service.audit import AT_THE_END, AuditRecord, PromptDigest
from service.errors import ConfigError
from service.logs import JsonLines, set_up
from service.settings import Settings
from tests.service.fake_engine import CHAT, MODEL, SECRET
from tests.service.world import World, world

CANARY = "canary-in-the-prompt"
KEY = "sk-canary-key"
ALLOWED = {field.name for field in fields(AuditRecord)}


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "neuronguard.audit"]


def of(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


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
    first, last = of(lines, "answer"), of(lines, "end")
    assert (len(first), len(last), len(lines)) == (13, 13, 26)
    assert all(set(line) == ALLOWED for line in first)
    assert all(set(line) == set(AT_THE_END) for line in last)
    for text in (CANARY, KEY, SECRET):
        assert text not in caplog.text
        assert text not in exported


async def test_one_line_for_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "r-1"})
        assert response.status_code == 200
        upstream_id = w.engine.seen[0].headers["x-request-id"]
    first, last = audited(caplog)
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
        "prompt_tokens": 7,
        "prompt_hmac": None,
        "tenant": None,
        "bundle": "b" * 64,
    }
    assert {name: first[name] for name in expected} == expected
    assert (last["event"], last["request_id"], last["outcome"]) == ("end", "r-1", "complete")
    assert (last["status"], last["completion_tokens"]) == (200, 2)
    assert last["total_seconds"] > 0


async def test_the_line_about_an_answer_is_written_before_its_first_byte(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        for stream in (False, True):
            caplog.clear()
            sent: list[list[str]] = []

            async def send(message: Any, sent: list[list[str]] = sent) -> None:
                sent.append([line["event"] for line in audited(caplog)])

            await w.app(*raw_request(CHAT | {"stream": stream}), send)
            assert sent[0] == ["answer"]
            assert all(events == ["answer"] for events in sent)
            assert [line["event"] for line in audited(caplog)] == ["answer", "end"]


def raw_request(body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Scope and receive of a request, as a server hands them over."""
    content = json.dumps(body).encode()
    parts = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Any:
        for part in parts:
            return part
        await asyncio.sleep(60)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    return scope, receive


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_audited_is_not_answered(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(line: str) -> None:
        raise OSError("no space left on device")

    async with world(tmp_path) as w:
        with monkeypatch.context() as patch:
            patch.setattr("service.audit.logger.info", full)
            answer = await w.client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_failed")
        assert "zxq" not in answer.text
        assert "x-guard-action" not in answer.headers
        assert w.metric("guard_errors_total", stage="audit", outcome="closed") == 1
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_prompt_is_recognised_by_those_who_hold_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "prompt.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    other = CHAT | {"messages": [{"role": "user", "content": "other"}]}
    async with world(tmp_path, audit_prompt_key_file=key) as w:
        for body in (CHAT, CHAT | {"max_tokens": 3}, other):
            await w.client.post("/v1/chat/completions", json=body)
    first, again, third = (line["prompt_hmac"] for line in of(audited(caplog), "answer"))
    assert first == again != third
    canonical = json.dumps({"prompt": CHAT["messages"]}, separators=(",", ":")).encode()
    assert first == hmac.new(b"k" * 32, canonical, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(("key", "mode", "says"), [(b"short", 0o600, "32"), (b"k" * 32, 0o644, "chmod 600")])
def test_a_key_for_prompts_is_a_secret(key: bytes, mode: int, says: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(key)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        PromptDigest.load(file)


@pytest.fixture
def loggers() -> Iterator[None]:
    """Leaves logging as it was."""
    found = [logging.getLogger(name) for name in (None, "neuronguard.audit", "httpx", "httpcore")]
    before = [(list(each.handlers), each.level, each.propagate) for each in found]
    yield
    for each, (handlers, level, propagate) in zip(found, before, strict=True):
        for handler in set(each.handlers) - set(handlers):
            handler.close()
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.mark.usefixtures("loggers")
def test_the_audit_file_is_rotated_and_old_ones_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    set_up(Settings(key_file=Path("k"), audit_file=file, audit_max_bytes=2000, audit_keep=2))
    for index in range(20):
        AuditRecord(time="t", request_id=str(index), route="r").write("answer")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    lines = [
        json.loads(line) for name in reversed(files) for line in (tmp_path / name).read_text().splitlines()
    ]
    assert [line["request_id"] for line in lines] == [str(index) for index in range(20)][-len(lines) :]
    assert all((tmp_path / name).stat().st_size <= 2000 for name in files)


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("no space left on device")


@pytest.mark.usefixtures("loggers")
def test_a_failing_audit_file_is_an_error(tmp_path: Path) -> None:
    set_up(Settings(key_file=Path("k"), audit_file=tmp_path / "audit.jsonl"))
    handler: Any = logging.getLogger("neuronguard.audit").handlers[-1]
    handler.stream.close()
    handler.stream = FullDisk()
    with pytest.raises(OSError, match="no space"):
        AuditRecord(time="t", request_id="i", route="r").write("answer")
    with pytest.raises(ConfigError, match="audit log cannot be written"):
        set_up(Settings(key_file=Path("k"), audit_file=tmp_path / "no" / "where"))


def test_the_applications_log_as_json_has_no_message_of_an_exception() -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("neuronguard.gateway", logging.ERROR, "f", 1, "request %s", ("r-1",), info)
    line = json.loads(JsonLines().format(record))
    assert {name: line[name] for name in ("level", "logger", "message", "exception")} == {
        "level": "error",
        "logger": "neuronguard.gateway",
        "message": "request r-1",
        "exception": "ValueError",
    }
    assert CANARY not in json.dumps(line)


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.M))
    assert documented == ALLOWED


async def test_the_probability_is_written_only_if_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, audit_scores=True) as w:
        await w.client.post("/v1/chat/completions", json=CHAT)
    assert of(audited(caplog), "answer")[0]["probability"] == 0.01


async def test_a_stream_that_breaks_off_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        w.engine.stream = [b'data: {"choices": []}\n\n']
        await w.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    (line,) = of(audited(caplog), "end")
    assert (line["outcome"], line["status"], line["code"]) == ("interrupted", 200, "upstream_interrupted")


async def test_operators_routes_are_not_audited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            await w.client.get(path)
    assert audited(caplog) == []
