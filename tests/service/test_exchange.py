"""Nothing of an answer is shown without the verdict that belongs to it."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.sealed import Keyring
from guard.verdict import Verdict
from tests.service.world import (
    BAD_CHAT,
    CHAT,
    HARMFUL,
    MODEL,
    SECRET,
    FakeEngine,
    World,
    a_status,
    eventually,
    world,
)

CHATS = "/v1/chat/completions"
TEXTS = "/v1/completions"
TEXT = {"model": MODEL, "prompt": "hello"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


def assert_unanswered(response: httpx.Response, code: str = "guard_no_verdict") -> None:
    assert response.status_code == 503
    assert error_of(response)["code"] == code
    assert SECRET not in response.text
    assert "x-guard-action" not in response.headers
    assert response.headers["retry-after"] == "2"


FALSE: dict[str, Callable[[Verdict, FakeEngine], str | None]] = {
    "missing": lambda verdict, engine: None,
    "malformed": lambda verdict, engine: "pass",
    "bad_mac": lambda verdict, engine: verdict.seal(Keyring.generate()),
    "unknown_key": lambda verdict, engine: verdict.seal(Keyring.generate("k2")),
    "wrong_nonce": lambda verdict, engine: verdict.model_copy(update={"nonce": "n" * 24}).seal(engine.keys),
    "other_order": lambda verdict, engine: verdict.model_copy(update={"policy": "lax"}).seal(engine.keys),
    "not_scored": lambda verdict, engine: verdict.model_copy(update={"probability": None}).seal(engine.keys),
    "inconsistent": lambda verdict, engine: verdict.model_copy(update={"probability": 0.99}).seal(
        engine.keys
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHATS, CHAT), (TEXTS, TEXT)])
@pytest.mark.parametrize("reason", FALSE)
async def test_without_a_true_verdict_there_is_no_answer(
    reason: str, path: str, body: dict[str, Any], stream: bool, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        w.engine.seal = lambda verdict: FALSE[reason](verdict, w.engine)
        response = await w.client.post(path, json=body | {"stream": stream})
        assert_unanswered(response)
        assert w.metric("guard_bypass_total", reason=reason) == w.total("guard_bypass_total") == 1
        assert w.metric("guard_errors_total", stage="verdict", outcome="closed") == 1


async def test_a_replayed_verdict_is_false(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        sealed: list[str] = []
        w.engine.seal = lambda verdict: sealed.append(verdict.seal(w.engine.keys)) or sealed[0]
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200
        assert_unanswered(await w.client.post(CHATS, json=CHAT))
        assert w.metric("guard_bypass_total", reason="wrong_nonce") == 1


async def test_a_client_cannot_send_a_verdict_or_a_directive_along(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        forged = {
            "x-guard-verdict": "a.b.c",
            "x-guard-directive": "d.e.f",
            "x-guard-mode": "observe",
            "cookie": "c",
        }
        response = await w.client.post(CHATS, json=BAD_CHAT, headers=forged)
        assert response.headers["x-guard-action"] == "refuse"
        headers = w.engine.seen[0].headers
        assert "d.e.f" not in headers["x-guard-directive"]
        assert not {"x-guard-verdict", "x-guard-mode", "cookie"} & set(headers)


OPEN = "policies: {default: {on_missing_verdict: open}}"


@pytest.mark.parametrize("stream", [False, True])
async def test_open_answers_without_a_verdict_and_counts_it(stream: bool, tmp_path: Path) -> None:
    async with world(tmp_path, OPEN) as w:
        w.engine.seal = lambda verdict: None
        response = await w.client.post(CHATS, json=CHAT | {"stream": stream})
        assert response.status_code == 200
        assert "model-token" in response.text
        assert response.headers["x-guard-action"] == "unguarded"
        assert w.metric("guard_bypass_total", reason="missing") == 1
        assert w.metric("guard_errors_total", stage="verdict", outcome="open") == 1
        assert (
            w.metric("guard_requests_total", **labels(action="unguarded", verdict="none", stream=stream)) == 1
        )


@pytest.mark.parametrize("reason", [reason for reason in FALSE if reason != "missing"])
async def test_open_does_not_believe_a_false_verdict(reason: str, tmp_path: Path) -> None:
    async with world(tmp_path, OPEN) as w:
        w.engine.seal = lambda verdict: FALSE[reason](verdict, w.engine)
        assert_unanswered(await w.client.post(CHATS, json=CHAT))


async def test_a_guard_that_failed_is_not_answered(tmp_path: Path) -> None:
    async with world(tmp_path, OPEN) as w:
        failed = {
            "action": "error",
            "decision": None,
            "probability": None,
            "reason": "no_score",
            "read": "nothing",
        }
        w.engine.change = lambda verdict: verdict.model_copy(update=failed)
        w.engine.leak = True
        assert_unanswered(await w.client.post(CHATS, json=CHAT), "guard_failed")
        assert w.total("guard_bypass_total") == 0
        assert w.metric("guard_errors_total", stage="guard", outcome="closed") == 1


@pytest.mark.parametrize("style", ["message", "content_filter"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHATS, BAD_CHAT), (TEXTS, TEXT | {"prompt": HARMFUL})])
async def test_a_refused_answer_shows_no_token_even_if_the_engine_sends_some(
    path: str, body: dict[str, Any], stream: bool, style: str, tmp_path: Path
) -> None:
    async with world(tmp_path, f"policies: {{default: {{refusal: {{style: {style}}}}}}}") as w:
        w.engine.leak = True
        response = await w.client.post(path, json=body | {"stream": stream, "n": 2})
        assert response.status_code == 200
        assert response.headers["x-guard-action"] == "refuse"
        assert "zxq" not in response.text
        assert "model-token" not in response.text
        assert w.engine.seen[0].directive.siblings == 2
        assert (
            w.metric("guard_requests_total", **labels(action="refuse", verdict="refuse", stream=stream)) == 1
        )


def labels(*, action: str, verdict: str, stream: bool, mode: str = "enforce") -> dict[str, str]:
    return {
        "policy": "default",
        "model": MODEL,
        "verdict": verdict,
        "action": action,
        "mode": mode,
        "stream": str(stream).lower(),
    }


async def test_observe_answers_and_reports(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {mode: observe}}") as w:
        response = await w.client.post(CHATS, json=BAD_CHAT)
        assert response.json()["choices"][0]["message"]["content"] == SECRET
        assert response.headers["x-guard-action"] == "pass"
        expected = labels(action="pass", verdict="refuse", stream=False, mode="observe")
        assert w.metric("guard_requests_total", **expected) == 1


async def test_tag_answers_and_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {rules: [{above: 0.5, action: tag}]}}") as w:
        response = await w.client.post(CHATS, json=BAD_CHAT)
        assert response.json()["choices"][0]["message"]["content"] == SECRET
        assert response.headers["x-guard-action"] == "tag"


async def test_the_score_is_a_header_only_if_the_policy_exposes_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert "x-guard-score" not in (await w.client.post(CHATS, json=CHAT)).headers
    async with world(tmp_path, "policies: {default: {expose_score: true}}") as w:
        for body, score in ((CHAT, "0.010000"), (BAD_CHAT, "0.970000")):
            assert (await w.client.post(CHATS, json=body)).headers["x-guard-score"] == score


async def test_the_engine_gets_a_directive_over_exactly_the_bytes_it_is_sent(tmp_path: Path) -> None:
    body = CHAT | {"user": "someone", "temperature": 0.5, "messages": [{"role": "user", "content": "é 😀"}]}
    async with world(tmp_path) as w:
        assert (await w.client.post(CHATS, json=body)).status_code == 200  # the fake engine checks the digest
        seen = w.engine.seen[0]
        assert seen.body == {name: value for name, value in body.items() if name != "user"}
        assert seen.directive.audience == "engine-a"
        assert seen.directive.decision.policy == "default"


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


def upstream(message: str = "boom zxq", code: Any = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


LONG = "This model's maximum context length is 512 tokens. However, you requested 600."


@pytest.mark.parametrize(
    ("error", "status", "code", "quoted"),
    [
        ((400, upstream("top_p must be in (0, 1]")), 400, "invalid_value", True),
        ((400, upstream(LONG)), 400, "context_length_exceeded", True),
        ((422, upstream()), 400, "invalid_value", True),
        ((404, upstream("The model `x` does not exist.", 404)), 404, "model_not_found", False),
        ((404, {"detail": "Not Found"}), 502, "engine_failed", False),
        ((401, {"error": "Unauthorized"}), 502, "engine_failed", False),
        ((307, {}), 502, "engine_failed", False),
        ((429, upstream()), 429, "engine_overloaded", False),
        ((500, upstream()), 502, "engine_failed", False),
        ((500, upstream(code="guard_no_verdict")), 503, "guard_no_verdict", False),
        ((503, upstream()), 503, "engine_unavailable", False),
        ((400, "zxq"), 400, "invalid_value", False),
        ((400, {"error": None}), 400, "invalid_value", False),
        (
            (400, upstream("the guard directive was refused: expired", "guard_directive_invalid")),
            503,
            "guard_directive_refused",
            False,
        ),
    ],
)
async def test_errors_of_the_engine_are_shaped(
    error: tuple[int, Any], status: int, code: str, quoted: bool, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        w.engine.error = error
        response = await w.client.post(CHATS, json=CHAT)
        assert error_of(response)["param"] in (None, "messages", "model")
        assert (response.status_code, error_of(response)["code"]) == (status, code)
        if quoted:
            assert error_of(response)["message"] == error[1]["error"]["message"]
        else:
            assert "zxq" not in response.text
        if code == "context_length_exceeded":
            assert error_of(response)["param"] == "messages"
        if status in (429, 503):
            assert "retry-after" in response.headers


async def test_the_field_that_the_engine_complains_of_is_named(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for param, expected in (("top_p", "top_p"), ("a field\n", None), (3, None)):
            w.engine.error = (400, {"error": {"message": "m", "code": 400, "param": param}})
            assert error_of(await w.client.post(CHATS, json=CHAT))["param"] == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>zxq</html>",
        b'{"choices": [{"zxq": ',
        b'"zxq"',
        b"[]",
        b"{}",
        b'{"choices": "zxq"}',
        b"",
        b"\xff\xfe",
    ],
)
async def test_a_body_that_is_no_answer_never_reaches_the_client(answer: bytes, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.answer = answer
        response = await w.client.post(CHATS, json=CHAT)
        assert (response.status_code, error_of(response)["code"]) == (502, "upstream_invalid")
        assert "zxq" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_nor_does_another_media_type(stream: bool, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.media_type = b"text/html"
        response = await w.client.post(CHATS, json=CHAT | {"stream": stream})
        assert (response.status_code, error_of(response)["code"]) == (502, "upstream_invalid")


async def test_an_answer_that_is_too_long_is_a_502(tmp_path: Path) -> None:
    async with world(tmp_path, max_answer_bytes=50) as w:
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 502


@pytest.mark.parametrize(("stream", "setting"), [(True, "verdict_timeout"), (False, "answer_timeout")])
async def test_a_verdict_that_does_not_come_in_time_is_a_504(
    stream: bool, setting: str, tmp_path: Path
) -> None:
    async with world(tmp_path, **{setting: 0.05}) as w:
        w.engine.before_headers = 5.0
        started = time.perf_counter()
        response = await w.client.post(CHATS, json=CHAT | {"stream": stream})
        assert time.perf_counter() - started < 2
        assert (response.status_code, error_of(response)["code"]) == (504, "engine_timeout")
        assert w.metric("guard_inflight_requests") == 0


async def test_a_whole_answer_is_passed_byte_for_byte(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.answer = b' {"choices":  [{"b": 1.0, "a": "\\u00e9"}] , "usage": null}\n'
        response = await w.client.post(CHATS, json=CHAT)
        assert response.content == w.engine.answer
        assert response.headers["content-type"] == "application/json"


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


async def lose(w: World, **changes: Any) -> None:
    w.engine.status = a_status(**changes)
    await eventually(lambda: w.watch.ready is None)


async def test_an_engine_that_is_not_ready_is_a_503(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await lose(w, state="starting", detail="self-test")
        for method, path in (
            ("POST", CHATS),
            ("POST", TEXTS),
            ("POST", "/v1/moderations"),
            ("GET", "/v1/models"),
        ):
            response = await w.client.request(method, path, json=CHAT)
            assert_unanswered(response, "engine_not_ready")
        assert w.engine.seen == []
