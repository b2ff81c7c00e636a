"""Streams that may still be withdrawn: nothing is sent before their end."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.answers import CHATS, error_of
from tests.service.fake_engine import CHAT, DIE, FakeEngine, a_monitor, a_status, chunk
from tests.service.test_live import STREAM, raw_request, silent
from tests.service.world import Live, live

DONE = b"data: [DONE]\n\n"
POLICY = "policies: {default: {monitor: {fpr: 0.01, debounce: 4, text: withdraw}}}"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Live]:
    engine = FakeEngine()
    engine.status = a_status(monitor=a_monitor((0.01, 4)))
    with live(tmp_path, POLICY, engine=engine, max_answer_bytes=1500) as running:
        yield running


def test_no_byte_before_the_end(gate: Live) -> None:
    ended = threading.Event()
    gate.engine.stream = [chunk("zxq-"), ended, chunk("model-token"), DONE]
    with raw_request(gate.url, STREAM) as sock:
        assert silent(sock, 0.3)
        ended.set()
        data = b""
        while not data.endswith(DONE):
            data += sock.recv(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"x-guard-action: pass" in head
    assert rest.endswith(b"".join(part for part in gate.engine.stream if isinstance(part, bytes)))


def test_a_client_that_leaves_stops_the_generation(gate: Live) -> None:
    gate.engine.stream = [chunk("zxq-"), 30.0]
    sock = raw_request(gate.url, STREAM)
    while not gate.engine.seen:
        time.sleep(0.01)
    sock.close()
    assert gate.engine.aborted.wait(5)


ERROR = b'data: {"error": {"message": "zxq", "code": 500}}\n\n'


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param([DIE], id="connection lost"),
        pytest.param([], id="ended without DONE"),
        pytest.param([ERROR, DONE], id="the engine failed"),
        pytest.param([b"data: <html>zxq\n\n", 30.0], id="not json"),
        pytest.param([chunk("x" * 2000), DONE], id="a long frame"),
        pytest.param([*[chunk("x" * 50)] * 12, DONE], id="many frames"),
    ],
)
def test_nothing_is_shown_of_a_stream_that_did_not_end_well(rest: list[Any], gate: Live) -> None:
    gate.engine.stream = [chunk("zxq-"), 0.02, *rest]
    answer = httpx.post(gate.url + CHATS, json=STREAM)
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_interrupted")
    assert "zxq" not in answer.text
    assert gate.app.state.gateway.pool.watches[0].backend.outstanding == 0


def test_the_first_byte_of_the_engine_is_measured_all_the_same(gate: Live) -> None:
    gate.engine.stream = [chunk("zxq-"), 0.5, DONE]
    assert httpx.post(gate.url + CHATS, json=STREAM).status_code == 200
    for name in ("guard_upstream_first_byte_seconds_sum", "guard_gateway_overhead_seconds_sum"):
        value = gate.registry.get_sample_value(name)
        assert value is not None
        assert 0 < value < 0.4


def test_other_answers_are_not_held(gate: Live) -> None:
    assert httpx.post(gate.url + CHATS, json=CHAT).status_code == 200
