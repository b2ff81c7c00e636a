"""Nothing of an answer is shown without the verdict that belongs to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guard.sealed import Keyring
from guard.verdict import Verdict
from tests.service.answers import CHATS, TEXT, TEXTS, assert_unanswered
from tests.service.fake_engine import BAD_CHAT, CHAT, HARMFUL, MODEL, SECRET, FakeEngine
from tests.service.world import world

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
