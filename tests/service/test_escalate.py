"""The uncertain band goes to a judge, and no token leaves before somebody has decided."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.answers import CHATS
from tests.service.fake_engine import CHAT, MODEL, SECRET
from tests.service.world import World, world

CANARY = "kx-canary"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": CANARY}]}
RULES = "[{above: 0.9, action: refuse}, {above: 0.4, action: escalate}, {above: 0.2, action: tag}]"


def policy(on_error: str = "refuse", mode: str = "enforce", **judge: Any) -> str:
    fields = {"base_url": "http://judge/v1", "model": "j", "timeout_s": 0.3, "on_error": on_error} | judge
    return f"policies: {{default: {{mode: {mode}, rules: {RULES}}}}}\njudges: {{a: {json.dumps(fields)}}}"


class FakeJudge:
    """What an OpenAI-compatible server answers."""

    def __init__(self, says: Callable[[], httpx.Response] | str) -> None:
        self.says = says
        self.asked: list[httpx.Request] = []
        self.pause = 0.0
        self.transport = httpx.MockTransport(self._answer)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        await asyncio.sleep(self.pause)
        if not isinstance(self.says, str):
            return self.says()
        return httpx.Response(200, json={"choices": [{"message": {"content": self.says}}]})


def unanswered(response: httpx.Response) -> bool:
    return response.headers["x-guard-action"] == "refuse" and "zxq" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_safe_request_is_sent_again_and_answered(stream: bool, tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        response = await w.client.post(CHATS, json=ASK | {"stream": stream})
        assert response.headers["x-guard-action"] == "pass"
        assert "model-token" in response.text
        first, second = (seen.directive for seen in w.engine.seen)
        assert first.nonce != second.nonce
        assert first.body_sha256 == second.body_sha256
        assert [rule.action for rule in first.decision.rules] == ["refuse", "escalate", "tag"]
        assert [rule.action for rule in second.decision.rules] == ["refuse", "pass", "tag"]
        labels = {"policy": "default", "model": MODEL, "mode": "enforce", "stream": str(stream).lower()}
        assert w.metric("guard_requests_total", verdict="escalate", action="pass", **labels) == 1
        assert w.total("guard_requests_total") == 1
        assert w.metric("guard_judgements_total", judge="a", outcome="safe") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unsafe_request_is_refused_and_not_sent_again(stream: bool, tmp_path: Path) -> None:
    judge = FakeJudge("unsafe\nS1")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        w.engine.leak = True
        assert unanswered(await w.client.post(CHATS, json=ASK | {"stream": stream}))
        assert len(w.engine.seen) == 1
        labels = {"policy": "default", "model": MODEL, "mode": "enforce", "stream": str(stream).lower()}
        assert w.metric("guard_requests_total", verdict="escalate", action="refuse", **labels) == 1


@pytest.mark.parametrize(("score", "action"), [(0.95, "refuse"), (0.3, "tag"), (0.1, "pass")])
async def test_only_the_band_goes_to_the_judge(score: float, action: str, tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = score
        assert (await w.client.post(CHATS, json=ASK)).headers["x-guard-action"] == action
        assert judge.asked == []


FAILURES: dict[str, Callable[[], httpx.Response] | str] = {
    "neither word": "I would rather not say",
    "both words, the wrong way round": "This is unsafe",
    "an error": lambda: httpx.Response(500, text="safe"),
    "not found": lambda: httpx.Response(404),
    "a redirect": lambda: httpx.Response(307, headers={"location": "http://elsewhere/"}),
    "not json": lambda: httpx.Response(200, text="safe"),
    "no choices": lambda: httpx.Response(200, json={"choices": []}),
    "null": lambda: httpx.Response(200, json={"choices": [{"message": {"content": None}}]}),
    "too much": lambda: httpx.Response(200, content=b" " * (2 << 20)),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_judge_that_fails_has_the_stated_outcome(failure: str, tmp_path: Path) -> None:
    for on_error in ("refuse", "pass"):
        judge = FakeJudge(FAILURES[failure])
        async with world(tmp_path, policy(on_error), judge=judge.transport) as w:
            w.engine.score = 0.6
            response = await w.client.post(CHATS, json=ASK)
            assert response.headers["x-guard-action"] == on_error
            assert (SECRET in response.text) == (on_error == "pass")
            assert w.metric("guard_judgements_total", judge="a", outcome="failed") == 1


async def test_a_judge_has_a_deadline(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    judge.pause = 30.0
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        async with asyncio.timeout(5):
            assert unanswered(await w.client.post(CHATS, json=ASK))


async def test_a_judge_that_has_too_much_to_do_is_not_waited_for(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    judge.pause = 0.2
    async with world(tmp_path, policy(max_concurrent=1), judge=judge.transport) as w:
        w.engine.score = 0.6
        answers = await asyncio.gather(*(w.client.post(CHATS, json=ASK) for _ in range(3)))
        assert sorted(answer.headers["x-guard-action"] for answer in answers) == ["pass", "refuse", "refuse"]


async def test_what_was_refused_stays_refused_the_second_time(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(), judge=judge.transport) as w:

        def rises() -> httpx.Response:
            w.engine.score = 0.95
            return httpx.Response(200, json={"choices": [{"message": {"content": "safe"}}]})

        judge.says = rises
        w.engine.score = 0.6
        assert unanswered(await w.client.post(CHATS, json=ASK))


async def test_the_second_run_needs_a_verdict_of_its_own(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        sealed: list[str] = []
        w.engine.seal = lambda verdict: sealed.append(verdict.seal(w.engine.keys)) or sealed[0]
        response = await w.client.post(CHATS, json=ASK)
        assert response.status_code == 503
        assert SECRET not in response.text


async def test_observing_reports_and_asks_nobody(tmp_path: Path) -> None:
    judge = FakeJudge("unsafe")
    async with world(tmp_path, policy(mode="observe"), judge=judge.transport) as w:
        w.engine.score = 0.6
        assert (await w.client.post(CHATS, json=ASK)).headers["x-guard-action"] == "pass"
        assert judge.asked == []
        labels = {"policy": "default", "model": MODEL, "mode": "observe", "stream": "false"}
        assert w.metric("guard_requests_total", verdict="escalate", action="pass", **labels) == 1


async def test_token_ids_cannot_be_judged(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        assert unanswered(await w.client.post("/v1/completions", json={"model": MODEL, "prompt": [1, 2]}))
        assert judge.asked == []
        texts = {"model": MODEL, "prompt": ["one", "two"]}
        assert (await w.client.post("/v1/completions", json=texts)).headers["x-guard-action"] == "pass"


@pytest.mark.parametrize(("says", "flagged"), [("safe", False), ("unsafe", True)])
async def test_checks_ask_the_judge_too(says: str, flagged: bool, tmp_path: Path) -> None:
    async with world(tmp_path, policy(), judge=FakeJudge(says).transport) as w:
        w.engine.score = 0.6
        result = (await w.client.post("/v1/moderations", json={"input": "x"})).json()["results"][0]
        assert result["flagged"] is flagged


async def question(w: World, judge: FakeJudge) -> list[dict[str, str]]:
    w.engine.score = 0.6
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    await w.client.post(CHATS, json=CHAT | {"messages": messages})
    asked = json.loads(judge.asked[0].content)
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("j", 0, 16)
    return list(asked["messages"])


async def test_how_a_plain_judge_is_asked(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-judge\n")
    judge = FakeJudge("safe")
    text = policy(api_key_file=str(tmp_path / "key"))
    async with world(tmp_path, text, judge=judge.transport) as w:
        system, user = await question(w, judge)
        assert "safe" in system["content"]
        assert json.loads(user["content"]) == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one\ntwo"},
        ]
        assert str(judge.asked[0].url) == "http://judge/v1/chat/completions"
        assert judge.asked[0].headers["authorization"] == "Bearer sk-judge"


async def test_how_a_llama_guard_is_asked(tmp_path: Path) -> None:
    judge = FakeJudge("safe")
    async with world(tmp_path, policy(style="llama-guard"), judge=judge.transport) as w:
        assert [turn["content"] for turn in await question(w, judge)] == ["be brief", "one\ntwo"]
        assert "authorization" not in judge.asked[0].headers


async def test_neither_prompt_nor_answer_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "neuronguard")
    judge = FakeJudge(f"{CANARY} is what they said")
    async with world(tmp_path, policy(), judge=judge.transport) as w:
        w.engine.score = 0.6
        await w.client.post(CHATS, json=ASK)
    assert "judge a failed" in caplog.text
    assert CANARY not in caplog.text
    audited = [json.loads(r.getMessage()) for r in caplog.records if r.name == "neuronguard.audit"]
    assert [audited[0][name] for name in ("verdict", "action", "judge")] == ["escalate", "refuse", "failed"]
