"""What only real sockets show: the order of bytes, streams as they happen, and connections that end."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, DIE, FakeEngine, a_status, chunk
from tests.service.world import Live, eventually, live, serving, settings_for, world

STREAM = CHAT | {"stream": True}


def raw_request(url: str, body: dict[str, Any]) -> socket.socket:
    """Send a request over a bare socket, which shows every byte at the moment it arrives."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    sock = socket.create_connection((host, int(port)), timeout=5)
    headers = ("host: x", "content-type: application/json", f"content-length: {len(content)}")
    head = "\r\n".join((f"POST {CHATS} HTTP/1.1", *headers, "", ""))
    sock.sendall(head.encode() + content)
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = sock.recv(65536)
        if not part:
            break
        data += part
    return data


def silent(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        sock.settimeout(5)


def test_no_byte_before_the_verdict(gate: Live) -> None:
    gate.engine.before_headers = 0.4
    with raw_request(gate.url, STREAM) as sock:
        assert silent(sock, 0.25)
        data = read_all(sock)
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"x-guard-action: pass" in head
    assert b"model-token" in rest


@pytest.mark.parametrize("lie", [None, "a.b.c"])
def test_a_stream_without_a_true_verdict_gives_no_byte_of_itself(gate: Live, lie: str | None) -> None:
    gate.engine.seal = lambda verdict: lie
    gate.engine.stream = [b"data: zxq\n\n" * 1000, 30.0]
    with raw_request(gate.url, STREAM) as sock:
        sock.settimeout(5)
        data = sock.recv(1 << 20)
    assert data.startswith(b"HTTP/1.1 503")
    assert b"zxq" not in data
    assert gate.engine.aborted.wait(5)


def test_a_refused_stream_shows_no_model_token_and_closes_upstream_at_once(gate: Live) -> None:
    gate.engine.leak = True
    gate.engine.stream = [chunk("zxq-leak"), 30.0]
    started = time.perf_counter()
    response = httpx.post(gate.url + CHATS, json=BAD_CHAT | {"stream": True})
    assert time.perf_counter() - started < 5
    assert response.headers["x-guard-action"] == "refuse"
    assert response.text.endswith("data: [DONE]\n\n")
    assert "zxq" not in response.text
    assert gate.engine.aborted.wait(5)


def test_a_passed_stream_is_the_engines_bytes(gate: Live) -> None:
    gate.engine.stream = [
        b": hello\n\n",
        b'data: {"choices":  [], "a": "\xc3',
        0.05,
        b'\xa9"}\n\ndata: {"x": 1}\r\n\r',
        0.05,
        b"\ndata: [DONE]\n\n",
    ]
    response = httpx.post(gate.url + CHATS, json=STREAM)
    assert response.content == b"".join(part for part in gate.engine.stream if isinstance(part, bytes))


def test_frames_come_as_they_are_made(gate: Live) -> None:
    seen = threading.Event()
    gate.engine.stream = [chunk("one"), seen, chunk("two"), b"data: [DONE]\n\n"]
    with httpx.stream("POST", gate.url + CHATS, json=STREAM, timeout=10) as response:
        parts = response.iter_text()
        first = next(parts)
        assert "one" in first
        assert "two" not in first
        seen.set()  # until now the engine has not made the second
        assert "two" in "".join(parts)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param([DIE], id="connection lost"),
        pytest.param([], id="ended without DONE"),
        pytest.param([b'data: {"choices": [{"zxq-half', DIE], id="lost inside a frame"),
        pytest.param([b"data: <html>zxq\n\n", 30.0], id="not json"),
    ],
)
def test_an_engine_that_dies_in_a_stream_is_an_error_frame_without_done(gate: Live, rest: list[Any]) -> None:
    gate.engine.stream = [chunk("first"), 0.02, *rest]
    response = httpx.post(gate.url + CHATS, json=STREAM)
    assert response.status_code == 200
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert "first" in frames[0]
    error = json.loads(frames[1].removeprefix("data: "))["error"]
    assert error["code"] == "upstream_interrupted"
    assert len(frames) == 2
    assert "zxq" not in response.text


def test_an_engine_that_dies_in_a_whole_answer_is_a_502(gate: Live) -> None:
    gate.engine.stream = [b'{"choices": []}', b" " * 100, 0.02, DIE]  # what came would even be JSON
    response = httpx.post(gate.url + CHATS, json=CHAT)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_interrupted"
    assert "zxq" not in response.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_the_request_before_its_verdict(gate: Live, stream: bool) -> None:
    gate.engine.before_headers = 30.0
    sock = raw_request(gate.url, CHAT | {"stream": stream})
    await eventually(lambda: len(gate.engine.seen) == 1)
    sock.close()
    assert await asyncio.to_thread(gate.engine.aborted.wait, 3)
    await eventually(lambda: gate.registry.get_sample_value("guard_inflight_requests") == 0)


async def test_a_client_that_leaves_aborts_a_stream(gate: Live) -> None:
    gate.engine.stream = [chunk("one"), 30.0]
    sock = raw_request(gate.url, STREAM)
    assert b"HTTP/1.1 200" in sock.recv(4096)
    sock.close()
    assert await asyncio.to_thread(gate.engine.aborted.wait, 3)


def test_a_stream_that_pauses_for_too_long_is_interrupted(tmp_path: Path) -> None:
    with live(tmp_path, idle_timeout=0.1) as gate:
        gate.engine.stream = [chunk("one"), 30.0]
        response = httpx.post(gate.url + CHATS, json=STREAM)
        assert "upstream_interrupted" in response.text
        assert "[DONE]" not in response.text
        assert gate.engine.aborted.wait(3)


def test_a_stream_that_never_ends_is_interrupted(tmp_path: Path) -> None:
    with live(tmp_path, answer_timeout=0.2) as gate:
        gate.engine.stream = [chunk("one"), 0.05] * 200
        response = httpx.post(gate.url + CHATS, json=STREAM)
        assert "upstream_interrupted" in response.text


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    with live(tmp_path, send_timeout=0.2) as gate:
        gate.engine.stream = [chunk("x" * 100_000)] * 500
        with raw_request(gate.url, STREAM) as sock:
            assert b"HTTP/1.1 200" in sock.recv(1000)
            await eventually(lambda: gate.registry.get_sample_value("guard_inflight_requests") == 0)


def test_a_request_too_many_is_a_503_at_once(tmp_path: Path) -> None:
    with live(tmp_path, max_connections=1, connect_timeout=5.0) as gate:
        gate.engine.stream = [chunk("one"), 3.0]
        with httpx.stream("POST", gate.url + CHATS, json=STREAM) as first:
            assert first.status_code == 200
            started = time.perf_counter()
            second = httpx.post(gate.url + CHATS, json=CHAT)
            assert time.perf_counter() - started < 2.9  # it does not wait for the first
            assert second.status_code == 503
            assert second.json()["error"]["code"] == "gateway_saturated"
            assert "retry-after" in second.headers
            assert gate.registry.get_sample_value("guard_rejections_total", {"reason": "saturated"}) == 1
            assert httpx.get(gate.url + "/readyz").status_code == 200
        gate.engine.stream = None
        assert httpx.post(gate.url + CHATS, json=CHAT).status_code == 200


async def test_an_engine_that_goes_and_comes_back(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = FakeEngine()
    settings = settings_for(engine, tmp_path, engine_url=f"http://127.0.0.1:{port}", connect_timeout=0.3)
    with serving(create_app(settings)) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/readyz")).status_code == 503
            with serving(engine, port):

                async def ready() -> bool:
                    return (await client.get("/readyz")).status_code == 200

                await eventually(ready)
                assert (await client.post(CHATS, json=CHAT)).status_code == 200
            down = await client.post(CHATS, json=CHAT)
            assert down.status_code == 503
            assert down.json()["error"]["code"] in ("engine_unreachable", "engine_not_ready")
            assert "retry-after" in down.headers

            async def unready() -> bool:
                return (await client.get("/readyz")).status_code == 503

            await eventually(unready)
            engine.status = a_status(audience="engine-b", bundle="c" * 64)
            with serving(engine, port):
                await eventually(ready, within=10)
                assert (await client.post(CHATS, json=CHAT)).status_code == 200
                assert engine.seen[-1].directive.audience == "engine-b"


async def test_a_connection_refused_for_a_moment_is_tried_again(tmp_path: Path) -> None:
    engine = FakeEngine()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = settings_for(engine, tmp_path, engine_url=f"http://127.0.0.1:{port}")
    with serving(create_app(settings)) as url:
        async with httpx.AsyncClient(base_url=url) as client:

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            with serving(engine, port):
                await eventually(ready, within=10)
            asked = asyncio.create_task(client.post(CHATS, json=CHAT))
            await asyncio.sleep(0.1)
            assert not asked.done()
            with serving(engine, port):
                assert (await asked).status_code == 200


async def test_backend_down_without_sockets_is_the_same_error(tmp_path: Path) -> None:
    """The seam: a transport that cannot connect."""
    async with world(tmp_path, max_connections=1) as w:

        def refuse(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("no", request=request)

        w.watch.backend._transport = httpx.MockTransport(refuse)
        for _ in range(2):  # what failed no longer counts as being at the engine
            response = await w.client.post(CHATS, json=CHAT)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unreachable")
        assert w.metric("guard_errors_total", stage="backend", outcome="closed") == 2
