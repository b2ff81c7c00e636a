"""The test string: a refusal on request, which can do nothing but refuse."""

import json
import logging
from pathlib import Path
from typing import Any

import openai
import pytest

from service.drill import TEST_STRING
from tests.service.answers import CHATS, TEXTS
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL, SECRET
from tests.service.world import live, world

ASKING = CHAT | {"messages": [{"role": "user", "content": TEST_STRING}]}
PARTS = [{"type": "text", "text": TEST_STRING[:9]}, {"type": "text", "text": TEST_STRING[9:]}]
SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
BODIES = {
    "a message": (CHATS, ASKING),
    "the last of several": (CHATS, ASKING | {"messages": [*SAID, *ASKING["messages"]]}),
    "parts": (CHATS, ASKING | {"messages": [{"role": "user", "content": PARTS}]}),
    "a prompt": (TEXTS, {"model": MODEL, "prompt": TEST_STRING}),
    "one of several prompts": (TEXTS, {"model": MODEL, "prompt": ["hello", TEST_STRING]}),
}
STYLES = {"message": 200, "content_filter": 200, "azure": 400, "error": 403}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["enforce", "observe"])
async def test_it_is_refused_as_the_policy_refuses(
    style: str, mode: str, stream: bool, tmp_path: Path
) -> None:
    policy = f"policies: {{default: {{mode: {mode}, refusal: {{style: {style}, text: Not here.}}}}}}"
    async with world(tmp_path, policy, test_string=True) as w:
        for path, body in BODIES.values():
            answer = await w.client.post(path, json=body | {"stream": stream, "n": 2})
            assert answer.status_code == STYLES[style]
            assert (answer.headers["x-guard-action"], answer.headers["x-guard-policy"]) == (
                "refuse",
                "default",
            )
            assert answer.headers["x-guard-test"] == "refusal"
            assert ("[DONE]" in answer.text) == (stream and answer.status_code == 200)
            assert ("Not here." in answer.text) == ((path, style) != (TEXTS, "content_filter"))
        assert w.engine.seen == []


async def test_it_has_the_shape_of_a_real_refusal(tmp_path: Path) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shape(member) for name, member in value.items()}
        return [shape(member) for member in value] if isinstance(value, list) else type(value)

    wish = {"moderation": {"model": "any"}, "n": 2}
    async with world(tmp_path, test_string=True) as w:
        real = await w.client.post(CHATS, json=BAD_CHAT | wish)
        test = await w.client.post(CHATS, json=ASKING | wish)
        assert shape(test.json()) == shape(real.json())
        assert test.json()["moderation"]["input"]["results"][0]["flagged"] is True
        assert set(test.headers) - set(real.headers) == {"x-guard-test"}


def test_openais_client_sees_a_refusal(tmp_path: Path) -> None:
    with (
        live(tmp_path, test_string=True) as gate,
        openai.OpenAI(base_url=gate.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        message = client.chat.completions.create(**ASKING).choices[0].message
        assert message.refusal == message.content == "I can't help with that."


async def test_it_is_counted_and_audited_as_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="neuronguard.audit")
    async with world(tmp_path, test_string=True) as w:
        assert (await w.client.post(CHATS, json=ASKING)).status_code == 200
        assert w.metric("guard_test_refusals_total", policy="default") == 1
        assert w.total("guard_requests_total") == w.total("guard_score_count") == 0
    lines = [json.loads(record.message) for record in caplog.records if record.name == "neuronguard.audit"]
    assert [line["event"] for line in lines] == ["answer", "end"]
    found = {
        name: lines[0][name] for name in ("verdict", "action", "engine", "upstream_id", "bundle", "status")
    }
    assert found == {
        "verdict": "test",
        "action": "refuse",
        "engine": None,
        "upstream_id": None,
        "bundle": None,
        "status": 200,
    }
    assert TEST_STRING not in caplog.text


def test_the_documented_string_is_the_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    assert f"\n{TEST_STRING}\n" in text


async def test_as_shipped_it_is_text_like_any_other(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for path, body in BODIES.values():
            answer = await w.client.post(path, json=body)
            assert (answer.headers["x-guard-action"], "x-guard-test" in answer.headers) == ("pass", False)
        assert len(w.engine.seen) == len(BODIES)


BAD = str(BAD_CHAT["messages"][0]["content"])
OTHERS = {
    "around it": [{"role": "user", "content": f"{TEST_STRING} {BAD}"}],
    "before it": [{"role": "user", "content": TEST_STRING}, {"role": "user", "content": BAD}],
    "as an instruction": [{"role": "system", "content": TEST_STRING}, {"role": "user", "content": BAD}],
}


@pytest.mark.parametrize("messages", OTHERS.values(), ids=OTHERS.keys())
async def test_it_weakens_nothing(messages: list[dict[str, str]], tmp_path: Path) -> None:
    """A request that merely holds it is judged as it is, and refused for what it says."""
    async with world(tmp_path, test_string=True) as w:
        answer = await w.client.post(CHATS, json=CHAT | {"messages": messages})
        assert (answer.headers["x-guard-action"], "x-guard-test" in answer.headers) == ("refuse", False)
        assert w.engine.seen[0].body["messages"] == messages
        assert SECRET not in answer.text


async def test_nor_does_text_from_elsewhere_that_holds_it_end_a_conversation(tmp_path: Path) -> None:
    async with world(tmp_path, test_string=True) as w:
        quoted = CHAT | {"messages": [{"role": "user", "content": f"summarise: {TEST_STRING}"}]}
        assert (await w.client.post(CHATS, json=quoted)).headers["x-guard-action"] == "pass"


async def test_it_needs_what_any_request_needs(tmp_path: Path) -> None:
    key = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {'a' * 64}, tenant: t}}]"
    async with world(tmp_path, key, test_string=True) as w:
        assert (await w.client.post(CHATS, json=ASKING)).status_code == 401
    async with world(tmp_path, test_string=True) as w:
        assert (await w.client.post(CHATS, json=ASKING | {"cache_salt": "s"})).status_code == 400
        assert (await w.client.post(CHATS, json=ASKING | {"model": "other"})).status_code == 404


async def test_checks_judge_it_as_text(tmp_path: Path) -> None:
    """They answer with what the engine found, and it found nothing."""
    async with world(tmp_path, test_string=True) as w:
        answer = await w.client.post("/v1/moderations", json={"input": TEST_STRING})
        assert answer.json()["results"][0]["flagged"] is False
        assert len(w.engine.seen) == 1
