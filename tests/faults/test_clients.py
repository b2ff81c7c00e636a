"""Clients that are slow, leave by halves, or send without end; others are served in the meantime."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.service.answers import CHATS
from tests.service.fake_engine import CHAT, SECRET, FakeEngine, chunk
from tests.service.processes import GatewayProcess, gateway_process
from tests.service.world import serving, settings_for

BODY = json.dumps(CHAT).encode()
HEAD = f"POST {CHATS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
LENGTH = f"content-length: {len(BODY)}\r\n".encode()
SECONDS = 0.6


@dataclass(frozen=True)
class Gate:
    process: GatewayProcess
    engine: FakeEngine

    def connect(self) -> socket.socket:
        host, port = self.process.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def assert_serves_others(self) -> None:
        assert httpx.post(self.process.url + CHATS, json=CHAT, timeout=10).status_code == 200


@pytest.fixture(scope="module")
def _gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder: Path = tmp_path_factory.mktemp("clients")
    engine = FakeEngine()
    key_file = settings_for(engine, folder).key_file
    bounds = {"head_timeout": str(SECONDS), "body_timeout": str(SECONDS), "max_head_bytes": "16384"}
    with serving(engine) as url, gateway_process(folder, url, key_file, **bounds) as process:
        yield Gate(process, engine)


@pytest.fixture
def gate(_gate: Gate) -> Gate:
    _gate.engine.reset()
    return _gate


def assert_closed(sock: socket.socket, send: Callable[[], None] = lambda: None) -> None:
    """Go on sending until the other side has closed the connection, which it does soon."""
    deadline = time.monotonic() + 20 * SECONDS
    sock.settimeout(0.1)
    while time.monotonic() < deadline:
        try:
            send()
            if sock.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("the connection is still open")


def test_a_connection_without_a_request_is_closed(gate: Gate) -> None:
    begun = time.monotonic()
    with gate.connect() as sock:
        gate.assert_serves_others()
        assert_closed(sock)
    assert time.monotonic() - begun > SECONDS / 2


def test_headers_that_drip_are_not_waited_for(gate: Gate) -> None:
    """The slow loris."""
    with gate.connect() as first, gate.connect() as second:
        first.sendall(HEAD)
        second.sendall(b"POST")
        gate.assert_serves_others()
        assert_closed(first, lambda: first.sendall(b"x-a: b\r\n"))
        assert_closed(second)


def test_nor_are_they_on_a_connection_that_was_kept(gate: Gate) -> None:
    with gate.connect() as sock:
        sock.sendall(HEAD + LENGTH + b"\r\n" + BODY)
        assert b"200 OK" in sock.recv(65536)
        assert_closed(sock, lambda: sock.sendall(b"x"))


def test_headers_without_end_are_cut_off(gate: Gate) -> None:
    with gate.connect() as sock:
        sock.sendall(HEAD)
        sent = 0

        def more() -> None:
            nonlocal sent
            sock.sendall(b"x-a: " + b"b" * 8000 + b"\r\n")
            sent += 8000

        assert_closed(sock, more)
        assert sent < 200_000


def test_a_body_that_drips_is_a_408(gate: Gate) -> None:
    with gate.connect() as sock:
        sock.sendall(HEAD + LENGTH + b"\r\n" + BODY[:9])
        gate.assert_serves_others()
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_goes_on_behind_its_answer_is_not_read_for_ever(gate: Gate) -> None:
    with gate.connect() as sock:
        sock.sendall(HEAD.replace(b"json", b"text") + b"content-length: 1000000\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 415 ")
        assert_closed(sock, lambda: sock.sendall(b"x"))


def test_headers_behind_a_body_are_no_headers(gate: Gate) -> None:
    """What a proxy has checked must not be changed by what follows the body."""
    trailer = b"x-request-id: trailing\r\ntraceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01\r\n"
    with gate.connect() as sock:
        parts = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + parts + trailer + b"\r\n")
        answer = sock.recv(65536)
    assert b"200 OK" in answer
    assert b"trailing" not in answer
    assert "traceparent" not in gate.engine.seen[-1].headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half_has_left(gate: Gate, stream: bool) -> None:
    gate.engine.stream = [chunk("first"), 30.0] if stream else None
    gate.engine.before_headers = 0.0 if stream else 30.0
    name = f"half-{stream}"
    body = json.dumps(CHAT | {"stream": stream}).encode()
    with gate.connect() as sock:
        sock.sendall(HEAD + f"x-request-id: {name}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert b"200 OK" in sock.recv(65536)
        else:
            deadline = time.monotonic() + 5
            while not gate.engine.seen and time.monotonic() < deadline:
                time.sleep(0.02)
        sock.shutdown(socket.SHUT_WR)
        assert gate.engine.aborted.wait(5)
        assert SECRET.encode() not in closed_bytes(sock)
    line = end_of(gate, name)
    assert (line["outcome"], line["status"]) == ("client_gone", 200 if stream else 499)


def closed_bytes(sock: socket.socket) -> bytes:
    found = b""
    while part := sock.recv(65536):
        found += part
    return found


def end_of(gate: Gate, name: str) -> dict[str, object]:
    deadline = time.monotonic() + 5
    while name not in gate.process.ends():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return gate.process.ends()[name]


def test_every_answered_request_has_its_two_lines(gate: Gate) -> None:
    """Of all the tests above; what never became a request has none."""
    gate.assert_serves_others()
    deadline = time.monotonic() + 5
    while not set(gate.process.answers()) <= set(ends := gate.process.ends()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    unanswered = [line for name, line in ends.items() if name not in gate.process.answers()]
    assert {line["status"] for line in unanswered} <= {499}
    assert {line["status"] for line in ends.values()} <= {200, 408, 415, 499}
    assert gate.process.metric("guard_bypass_total") == 0
    assert gate.process.metric("guard_inflight_requests") == 0
