"""An engine's server that breaks the connection, says what is not HTTP, or says nothing."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from guard.sealed import Keyring
from service.app import create_app
from tests.faults.raw_engine import RawEngine, Script, raw_engine, whole_answer
from tests.service.answers import CHATS
from tests.service.fake_engine import CHAT, SECRET, chunk
from tests.service.world import serving, settings_for

ANSWER = json.dumps({"choices": [{"message": {"content": SECRET}}]}).encode()


class Gate:
    """A gateway in front of a raw engine."""

    def __init__(self, url: str, engine: RawEngine, registry: CollectorRegistry) -> None:
        self.url, self.engine, self.registry = url, engine, registry

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(self.url + CHATS, json=CHAT | more, timeout=20)

    def failed(self) -> float:
        """Failures counted so far; nothing is ever counted as open."""
        found = {"closed": 0.0, "open": 0.0}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name == "guard_errors_total":
                    found[sample.labels["outcome"]] += sample.value
        assert found["open"] == 0
        return found["closed"]


@pytest.fixture(scope="module")
def _gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder: Path = tmp_path_factory.mktemp("raw")
    keys, registry = Keyring.generate(), CollectorRegistry()
    with raw_engine(keys) as (engine_url, engine):
        settings = settings_for(
            engine._fake,
            folder,
            engine_url=engine_url,
            verdict_timeout=0.4,
            answer_timeout=0.6,
            idle_timeout=0.3,
            breaker_failures=10_000,
        )
        with serving(create_app(settings, registry=registry)) as url:
            deadline = time.monotonic() + 10
            while httpx.get(url + "/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield Gate(url, engine, registry)


@pytest.fixture
def gate(_gate: Gate) -> Gate:
    _gate.engine.keep, _gate.engine.asked = False, 0
    return _gate


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "neuronguard.audit"]


def two_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Both lines about one request; the second is written when the client has the whole answer already."""
    deadline = time.monotonic() + 5
    while len(audited(caplog)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return audited(caplog)


def checked(gate: Gate, caplog: pytest.LogCaptureFixture, **more: Any) -> tuple[int, str]:
    """Ask once; returns status and error code, after a look at what every failure has in common."""
    caplog.set_level(logging.INFO, logger="neuronguard.audit")
    caplog.clear()
    before = gate.failed()
    answer = gate.ask(**more)
    assert SECRET not in answer.text
    assert "zxq" not in answer.text
    code = answer.json()["error"]["code"]
    assert gate.failed() == before + 1
    line = next(line for line in audited(caplog) if line["event"] == "answer")
    assert (line["status"], line["code"], line["action"]) == (answer.status_code, code, "none")
    return answer.status_code, code


SILENT = 30.0
BEFORE: dict[str, tuple[Script, int, str]] = {
    "it hangs up": (lambda verdict: [], 502, "engine_failed"),
    "it breaks off": (lambda verdict: ["reset"], 502, "engine_failed"),
    "no HTTP": (lambda verdict: [b"zxq zxq zxq\r\n\r\n"], 502, "engine_failed"),
    "zeros": (lambda verdict: [bytes(4096)], 502, "engine_failed"),
    "half a status line": (lambda verdict: [b"HTTP/1.1 20"], 502, "engine_failed"),
    "headers without end": (
        lambda verdict: [b"HTTP/1.1 200 OK\r\nx: " + b"z" * 500_000],
        502,
        "engine_failed",
    ),
    "silence": (lambda verdict: [SILENT], 504, "engine_timeout"),
    "half a head, then silence": (
        lambda verdict: [b"HTTP/1.1 200 OK\r\nx: y", SILENT],
        504,
        "engine_timeout",
    ),
    "an answer without a verdict": (lambda verdict: [whole_answer(ANSWER)], 503, "guard_no_verdict"),
    "two verdicts": (lambda verdict: [whole_answer(ANSWER, verdict, verdict)], 503, "guard_no_verdict"),
    "a verdict with something behind it": (
        lambda verdict: [whole_answer(ANSWER, verdict + ", pass")],
        503,
        "guard_no_verdict",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE)
def test_before_a_verdict_there_is_an_error_and_nothing_of_the_engine(
    fault: str, stream: bool, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    script, status, code = BEFORE[fault]
    gate.engine.script = script
    started = time.perf_counter()
    assert checked(gate, caplog, stream=stream) == (status, code)
    assert time.perf_counter() - started < 5
    assert gate.engine.asked == 1  # what was sent is not sent again


def stream_head(verdict: str) -> bytes:
    return chunked_head("text/event-stream", verdict)


def pieces(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def chunked_head(media_type: str, verdict: str) -> bytes:
    lines = ("HTTP/1.1 200 OK", f"content-type: {media_type}", "transfer-encoding: chunked", verdict)
    return "\r\n".join((*lines, "", "")).encode()


WHOLE: dict[str, Script] = {
    "the body is shorter than was said": lambda verdict: [whole_answer(ANSWER + b" ", verdict)[:-1]],
    "it breaks off": lambda verdict: [whole_answer(ANSWER, verdict)[:-9], "reset"],
    "it stops": lambda verdict: [whole_answer(ANSWER, verdict)[:-9], SILENT],
    "no chunks": lambda verdict: [chunked_head("application/json", verdict), 0.05, b"zz\r\n"],
}


@pytest.mark.parametrize("fault", WHOLE)
def test_half_an_answer_is_none(fault: str, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    gate.engine.script = WHOLE[fault]
    caplog.set_level(logging.INFO, logger="neuronguard.audit")
    answer = gate.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_interrupted")
    assert SECRET not in answer.text
    assert [line["status"] for line in two_lines(caplog)] == [502, 502]


STREAMS: dict[str, Script] = {
    "it hangs up": lambda verdict: [stream_head(verdict) + pieces(chunk("first")), 0.05],
    "it breaks off": lambda verdict: [stream_head(verdict) + pieces(chunk("first")), 0.05, "reset"],
    "it stops": lambda verdict: [stream_head(verdict) + pieces(chunk("first")), SILENT],
    "no chunks": lambda verdict: [stream_head(verdict) + pieces(chunk("first")), 0.05, b"zxq zxq\r\n"],
    "no JSON": lambda verdict: [stream_head(verdict) + pieces(chunk("first"), b"data: zxq\n\n"), SILENT],
    "an end without [DONE]": lambda verdict: [
        stream_head(verdict) + pieces(chunk("first"), b""),
        0.05,
    ],
}


@pytest.mark.parametrize("fault", STREAMS)
def test_half_a_stream_ends_in_an_error_frame(
    fault: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.engine.script = STREAMS[fault]
    caplog.set_level(logging.INFO, logger="neuronguard.audit")
    before = gate.failed()
    frames = gate.ask(stream=True).text.removesuffix("\n\n").split("\n\n")
    assert "first" in frames[0]
    assert json.loads(frames[1].removeprefix("data: "))["error"]["code"] == "upstream_interrupted"
    assert len(frames) == 2
    assert gate.failed() == before + 1
    first, last = two_lines(caplog)
    assert (first["action"], last["outcome"], last["code"]) == ("pass", "interrupted", "upstream_interrupted")


def test_an_answer_that_nobody_asked_for_is_nobodys(gate: Gate) -> None:
    """Two answers to one request: the second must not become that of the next request."""
    smuggled = json.dumps({"choices": [{"message": {"content": "zxq-smuggled"}}]}).encode()
    for stream in (False, True):
        gate.engine.keep = True
        gate.engine.script = lambda verdict: [
            whole_answer(ANSWER, verdict) + whole_answer(smuggled, verdict),
            0.2,
        ]
        assert gate.ask().status_code in (200, 502)
        gate.engine.script = lambda verdict: [whole_answer(ANSWER, verdict)]
        for _ in range(3):
            assert "zxq-smuggled" not in gate.ask(stream=stream).text
