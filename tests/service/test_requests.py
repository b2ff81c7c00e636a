"""Requests that are wrong in themselves, and what of a request's headers goes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.service.answers import CHATS, error_of
from tests.service.fake_engine import CHAT, SECRET
from tests.service.world import world


async def test_ids_for_the_engine_are_the_gateways_own(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for _ in range(2):
            response = await w.client.post(CHATS, json=CHAT, headers={"x-request-id": "mine-1"})
            assert response.headers["x-request-id"] == "mine-1"
        ids = [seen.headers["x-request-id"] for seen in w.engine.seen]
        assert len({*ids, "mine-1"}) == 3


@pytest.mark.parametrize("sent", ["", "a" * 65, "a b", "a\tb", "ü", '{"a":1}'])
async def test_an_odd_request_id_is_replaced(sent: str, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        response = await w.client.get("/v1/models", headers={"x-request-id": sent.encode()})
        assert response.headers["x-request-id"] != sent
        assert len(response.headers["x-request-id"]) == 32


async def test_only_a_wellformed_traceparent_passes_through(tmp_path: Path) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    async with world(tmp_path) as w:
        await w.client.post(CHATS, json=CHAT, headers={"traceparent": trace, "tracestate": "x=y"})
        await w.client.post(CHATS, json=CHAT, headers={"traceparent": "evil"})
        assert w.engine.seen[0].headers["traceparent"] == trace
        assert "tracestate" not in w.engine.seen[0].headers
        assert "traceparent" not in w.engine.seen[1].headers


async def test_request_errors(tmp_path: Path) -> None:
    async with world(tmp_path, max_body_bytes=1000, max_siblings=4, max_json_depth=5) as w:

        async def post(status: int, code: str, **kwargs: Any) -> dict[str, Any]:
            kwargs.setdefault("headers", {"content-type": "application/json"})
            response = await w.client.post(CHATS, **kwargs)
            error = error_of(response)
            assert (response.status_code, error["code"]) == (status, code)
            return error

        await post(400, "invalid_json", content=b"{")
        await post(400, "invalid_json", content=b"")
        await post(400, "invalid_json", content=json.dumps(CHAT).encode()[:-1] + b', "model": "lab/tiny"}')
        await post(400, "invalid_json", content=b'{"model": "m", "temperature": NaN}')
        await post(400, "invalid_json", content=b'{"a":' * 6 + b"1" + b"}" * 6)
        await post(413, "request_too_large", content=b" " * 1001)
        await post(413, "request_too_large", content=pieces())
        await post(
            415, "unsupported_media_type", content=json.dumps(CHAT), headers={"content-type": "text/plain"}
        )
        gzip = {"content-type": "application/json", "content-encoding": "gzip"}
        await post(415, "unsupported_media_type", content=json.dumps(CHAT), headers=gzip)
        assert (await post(400, "invalid_value", json=CHAT | {"n": 5}))["param"] == "n"
        error = await post(404, "model_not_found", json=CHAT | {"model": "gpt-x"})
        assert error["param"] == "model"
        assert "gpt-x" in error["message"]
        assert w.engine.seen == []
        assert w.metric("guard_errors_total", stage="request", outcome="closed") == 11


async def pieces() -> Any:
    for _ in range(11):
        yield b" " * 100


async def test_a_body_that_does_not_arrive_is_a_408(tmp_path: Path) -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    async with world(tmp_path, body_timeout=0.05) as w:
        response = await w.client.post(CHATS, content=slow(), headers={"content-type": "application/json"})
        assert (response.status_code, error_of(response)["code"]) == (408, "request_timeout")


async def test_a_bug_is_a_500_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError(SECRET)

    async with world(tmp_path) as w:
        monkeypatch.setattr("service.gateway.validate", broken)
        response = await w.client.post(CHATS, json=CHAT)
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
        assert SECRET not in response.text + caplog.text
        assert "KeyError" in caplog.text
        assert response.headers["x-request-id"] in caplog.text
