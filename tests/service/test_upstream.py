"""What the engine says of itself or gets wrong, and what of it a client is told."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.service.answers import CHATS, TEXTS, assert_unanswered, error_of
from tests.service.fake_engine import CHAT, a_status
from tests.service.world import World, eventually, world


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
