"""What the tests look for in an answer of the gateway."""

from typing import Any

import httpx

from tests.service.fake_engine import MODEL, SECRET

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
