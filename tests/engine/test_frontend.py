"""The middleware against a small ASGI app that behaves like vLLM's server: requests, outputs, answers."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from guard.engine.config import CONFIG_KEY, ENTRIES_KEY, EXTRA_ARG, KEY_FILE_ENV
from guard.engine.frontend import Exchanges, GuardMiddleware
from guard.sealed import Keyring
from guard.verdict import DIRECTIVE_HEADER, VERDICT_HEADER, Directive, Verdict
from tests.engine.cards import REFUSE_AT_HALF

KEYS = Keyring.generate()


class Processor:
    """vLLM's OutputProcessor as the middleware sees it."""

    def __init__(self) -> None:
        self.added: list[Any] = []

    def add_request(self, request: Any, prompt: Any, parent_req: Any, request_index: int, queue: Any) -> None:
        self.added.append(request)

    def process_outputs(self, outputs: list[Any], *args: Any) -> list[Any]:
        return outputs


class Server:
    """An inner app whose engine gives the next ``actions``, one for each engine request it makes."""

    def __init__(
        self, actions: list[str], *, status: int = 200, stream: bool = True, extra: Any = None
    ) -> None:
        self.actions, self.status, self.stream, self.extra = actions, status, stream, extra
        self.processor = Processor()
        self.exchanges = Exchanges(self.processor)
        self.cancelled = False
        self.body = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = (await receive())["body"]
        try:
            await self.answer(send)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def answer(self, send: Any) -> None:
        if self.status >= 400:
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error":{}}'})
            return
        for i in range(len(self.actions)):
            params = SimpleNamespace(extra_args=self.extra)
            request = SimpleNamespace(request_id=f"r{i}", sampling_params=params, prompt_token_ids=[1, 2])
            self.processor.add_request(request, None, None, 0, None)
        if self.stream:  # the status line goes out before the engine has said anything
            await send({"type": "http.response.start", "status": 200, "headers": []})
        for i, action in enumerate(self.actions):
            await asyncio.sleep(0.01)
            if action != "nothing":
                self.emit(f"r{i}", action)
        if not self.stream:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"model ", "more_body": True})
        await send({"type": "http.response.body", "body": b"text"})

    def emit(self, request_id: str, action: str) -> None:
        verdict = Verdict(
            action=action,
            decision=None,
            probability=0.2,
            logit=0.0,
            threshold=0.5,
            unsafe=False,
            mode="enforce",
            policy="p",
            bundle="b",
            read="prompt_last",
            prompt_tokens=2,
            nonce=NONCE.get(request_id),
        )
        output = SimpleNamespace(
            request_id=request_id,
            kv_transfer_params={CONFIG_KEY: verdict.model_dump_json(), ENTRIES_KEY: 3},
        )
        (seen,) = self.processor.process_outputs([output])
        assert seen.kv_transfer_params is None, "the verdict must not travel on to clients"


NONCE: dict[str, str] = {}


class Call:
    """One HTTP request through the middleware, message by message."""

    def __init__(
        self, server: Server, *, siblings: int = 1, body: bytes = b"{}", sealed: str | None = ""
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.directive = Directive.issue(REFUSE_AT_HALF, audience="engine", body=body, siblings=siblings)
        NONCE.update({f"r{i}": self.directive.nonce for i in range(8)})
        self.middleware = GuardMiddleware(server)
        self.middleware._exchanges = server.exchanges
        header = self.directive.seal(KEYS) if sealed == "" else sealed
        headers = [] if header is None else [(DIRECTIVE_HEADER.encode(), header.encode())]
        self.scope = {"type": "http", "path": "/v1/completions", "headers": headers}
        self.body = body
        self.leave = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def run(self) -> Call:
        await asyncio.wait_for(self.middleware(self.scope, self.receive, self.send), 5)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def content(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    @property
    def verdict(self) -> Verdict | None:
        header = dict(self.sent[0]["headers"]).get(VERDICT_HEADER.encode())
        return header and Verdict.open(header.decode(), KEYS, nonce=self.directive.nonce)


@pytest.fixture(autouse=True)
def _key_file(tmp_path, monkeypatch):
    KEYS.save(tmp_path / "keys")
    monkeypatch.setenv(KEY_FILE_ENV, str(tmp_path / "keys"))
    monkeypatch.delenv("NEURONGUARD_AUDIENCE", raising=False)


@pytest.mark.parametrize("stream", [True, False])
async def test_passed_answer_goes_out_under_its_verdict(stream):
    call = await Call(Server(["pass"], stream=stream)).run()
    assert (call.status, call.content, call.verdict.action) == (200, b"model text", "pass")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("action", ["refuse", "escalate", "checked", "error"])
async def test_stopped_answer_holds_nothing_of_the_model(action, stream):
    server = Server([action], stream=stream)
    call = await Call(server).run()
    assert (call.status, call.content, call.verdict.action) == (200, b"{}", action)


async def test_refused_sibling_stops_all_and_cancels_the_handler():
    server = Server(["refuse", "nothing", "nothing"])
    server.stream = True
    call = await Call(server, siblings=3).run()
    assert (call.content, call.verdict.action) == (b"{}", "refuse")
    assert server.cancelled


async def test_nothing_is_sent_before_the_last_sibling_is_judged():
    server = Server(["pass", "nothing"])
    call = Call(server, siblings=2)
    running = asyncio.create_task(call.run())
    await asyncio.sleep(0.1)
    assert call.sent == []
    server.emit("r1", "pass")
    await running
    assert call.content == b"model text"


async def test_answer_without_verdict_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setenv("NEURONGUARD_VERDICT_DEADLINE", "0.1")
    call = await Call(Server(["nothing"])).run()
    assert (call.status, call.verdict) == (500, None)
    assert b"model" not in call.content


async def test_answer_that_asked_the_engine_nothing_is_not_shown():
    call = await Call(Server([])).run()
    assert (call.status, call.verdict) == (500, None)
    assert b"model" not in call.content


async def test_stream_that_begins_with_an_error_frame_becomes_that_error():
    server = Server([])
    server.answer = _error_frame
    call = await Call(server).run()
    assert call.status == 400
    assert json.loads(call.content)["error"]["message"] == "bad parameter"


async def _error_frame(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    frame = b'data: {"error": {"message": "bad parameter", "code": 400}}\n\n'
    await send({"type": "http.response.body", "body": frame})


async def test_error_status_goes_through_without_a_verdict():
    call = await Call(Server([], status=422)).run()
    assert (call.status, call.content, call.verdict) == (422, b'{"error":{}}', None)


async def test_invalid_directive_never_reaches_the_handler():
    server = Server(["pass"])
    call = await Call(server, sealed="k1.e30.AAAA").run()
    assert call.status == 400
    assert json.loads(call.content)["error"]["code"] == "guard_directive_invalid"
    assert server.processor.added == []


async def test_handler_sees_the_body_and_the_scheduler_the_directive():
    server = Server(["pass"], extra={EXTRA_ARG: "forged", "other": 1})
    call = await Call(server, body=b'{"a": 1}').run()
    assert server.body == b'{"a": 1}'
    extra = server.processor.added[0].sampling_params.extra_args
    assert extra["other"] == 1
    assert Directive.open(extra[EXTRA_ARG], KEYS, audience="engine") == call.directive


async def test_direct_request_loses_what_the_client_put_in_the_directives_place():
    server = Server(["pass"], extra={EXTRA_ARG: "forged"})
    call = await Call(server, sealed=None).run()
    assert server.processor.added[0].sampling_params.extra_args is None
    assert (call.status, call.verdict) == (200, None)


async def test_client_that_leaves_cancels_the_handler():
    server = Server(["nothing"])
    call = Call(server)
    call.leave.set()
    await call.run()
    assert server.cancelled
    assert call.sent == []


async def test_no_state_stays_behind():
    for actions in (["pass"], ["refuse", "nothing"], []):
        server = Server(actions)
        await Call(server, siblings=max(1, len(actions))).run()
        assert len(server.exchanges) == 0


async def test_status_before_the_server_has_started():
    call = Call(Server([]), sealed=None)
    call.scope["path"] = "/guard/status"
    await call.run()
    assert call.status == 503


async def test_what_is_held_for_requests_is_counted_and_gone_afterwards():
    server = Server(["pass"])
    call = Call(server)
    held: list[int] = []
    answer = server.answer

    async def watched(send: Any) -> None:
        held.append(len(server.exchanges))
        await answer(send)
        held.append(len(server.exchanges))

    server.answer = watched
    await call.run()
    assert held == [0, 1]
    assert len(server.exchanges) == 0
    assert REGISTRY.get_sample_value("guard_engine_ledger_entries") == 3
