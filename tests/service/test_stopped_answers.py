"""Answers that the engine stopped as they grew: in every style, as raw bytes and for OpenAI's client."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI
from pydantic import BaseModel

from guard.monitor import STOPPED, Stop
from guard.sealed import Keyring
from tests.service.answers import CHATS, TEXT, TEXTS, error_of
from tests.service.fake_answers import SECRET, TOKENS, End, stream_of, together, whole
from tests.service.fake_engine import CHAT, MODEL, FakeEngine, a_monitor, a_status
from tests.service.world import World, world

STYLES = ("message", "content_filter", "azure", "error")
REASONS = {"message": "stop", "content_filter": "content_filter", "azure": "content_filter"} | {
    "error": "content_filter"
}
SORRY = "Not here."
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


class Word(BaseModel):
    word: str


@contextlib.asynccontextmanager
async def watched(
    folder: Path, style: str = "message", text: str = "keep", more: str = "", **changes: Any
) -> AsyncIterator[World]:
    """A gateway whose policy watches answers, before an engine that stops the first two at once."""
    engine = FakeEngine()
    engine.status = a_status(monitor=a_monitor((0.01, 4)))
    engine.stops_after = {0: 1, 1: 1}
    refusal = f"refusal: {{style: {style}, text: '{SORRY}'}}"
    policy = f"policies: {{default: {{{more}monitor: {{fpr: 0.01, debounce: 4, text: {text}}}, {refusal}}}}}"
    async with world(folder, policy, engine=engine, **changes) as w:
        yield w


def sdk(w: World) -> AsyncOpenAI:
    return AsyncOpenAI(http_client=w.client, base_url="http://gateway/v1", api_key="none", max_retries=0)


def chunks_of(text: str) -> list[dict[str, Any]]:
    parts = text.removesuffix("\n\n").split("\n\n")
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def index_of(frame: dict[str, Any]) -> int:
    (choice,) = frame["choices"]
    return int(choice["index"])


async def test_the_directive_orders_what_the_bundle_says_of_the_rate(tmp_path: Path) -> None:
    async with watched(tmp_path) as w:
        await w.client.post(CHATS, json=CHAT)
        (monitor,) = w.engine.status.monitor
        ordered = w.engine.seen[0].directive.decision.monitor
        assert ordered is not None
        assert (ordered.logit, ordered.debounce) == (monitor.logit, 4)


@pytest.mark.parametrize("style", STYLES)
async def test_a_stopped_chat_keeps_its_text(style: str, tmp_path: Path) -> None:
    async with watched(tmp_path, style) as w:
        raw = await sdk(w).chat.completions.with_raw_response.create(model=MODEL, messages=CHAT["messages"])
        answer = raw.parse()
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.refusal) == (TOKENS[0], SORRY)
        assert choice.finish_reason == REASONS[style]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
        assert raw.headers["x-guard-action"] == "stop"
        assert STOPPED not in raw.text
        assert ("content_filter_results" in raw.text) == (style == "azure")


@pytest.mark.parametrize("style", STYLES)
async def test_a_stopped_stream_ends_with_its_text_so_far(style: str, tmp_path: Path) -> None:
    async with watched(tmp_path, style) as w:
        stream = await sdk(w).chat.completions.create(model=MODEL, messages=CHAT["messages"], **STREAM)  # type: ignore[call-overload]
        parts = [part async for part in stream]
        choices = [choice for part in parts for choice in part.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == TOKENS[0]
        assert "".join(choice.delta.refusal or "" for choice in choices) == SORRY
        assert [choice.finish_reason for choice in choices] == [None, REASONS[style]]
        assert parts[-1].usage.completion_tokens == 1
        raw = await w.client.post(CHATS, json=CHAT | STREAM)
        assert STOPPED not in raw.text
        assert raw.headers["x-guard-action"] == "pass"  # was sent before anybody knew
        assert ("content_filter_results" in raw.text) == (style == "azure")


@pytest.mark.parametrize("style", STYLES[:3])
async def test_a_withdrawn_chat_is_the_refusal_of_its_style(style: str, tmp_path: Path) -> None:
    async with watched(tmp_path, style, "withdraw") as w:
        answer = await sdk(w).chat.completions.create(model=MODEL, messages=CHAT["messages"])
        (choice,) = answer.choices
        assert choice.message.content == (SORRY if style == "message" else "")
        assert (choice.message.refusal, choice.finish_reason) == (SORRY, REASONS[style])
        raw = await w.client.post(CHATS, json=CHAT)
        assert raw.headers["x-guard-action"] == "stop"
        assert not any(word in raw.text for word in (*TOKENS, STOPPED))
        assert raw.json()["usage"] == {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
        assert ("content_filter_results" in raw.text) == (style == "azure")


@pytest.mark.parametrize("style", STYLES[:3])
async def test_a_withdrawn_stream_is_the_refusal_of_its_style(style: str, tmp_path: Path) -> None:
    async with watched(tmp_path, style, "withdraw") as w:
        stream: Any = await sdk(w).chat.completions.create(model=MODEL, messages=CHAT["messages"], **STREAM)
        choices = [choice async for part in stream for choice in part.choices]
        said = "".join(choice.delta.content or "" for choice in choices)
        assert said == (SORRY if style == "message" else "")
        assert "".join(choice.delta.refusal or "" for choice in choices) == SORRY
        assert [choice.finish_reason for choice in choices] == [None, None, REASONS[style]]
        raw = await w.client.post(CHATS, json=CHAT | STREAM)
        assert raw.headers["x-guard-action"] == "stop"
        assert not any(word in raw.text for word in (*TOKENS, STOPPED))
        found = chunks_of(raw.text)
        assert found[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
        assert len({(frame["id"], frame["object"], frame["created"], frame["model"]) for frame in found}) == 1
        assert ("content_filter_results" in raw.text) == (style == "azure")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_a_withdrawn_answer_is_an_error_in_that_style(path: str, stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, "error", "withdraw") as w:
        raw = await w.client.post(path, json=(CHAT if path == CHATS else TEXT) | {"stream": stream, "n": 2})
        assert (raw.status_code, raw.headers["content-type"]) == (403, "application/json")
        assert (error_of(raw)["code"], error_of(raw)["message"]) == ("content_policy_violation", SORRY)
        assert raw.headers["x-guard-action"] == "stop"
        with pytest.raises(openai.PermissionDeniedError):
            await sdk(w).chat.completions.create(model=MODEL, messages=CHAT["messages"], stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["keep", "withdraw"])
@pytest.mark.parametrize("style", STYLES[:3])
async def test_text_completions(style: str, text: str, stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, style, text) as w:
        answer: Any = await sdk(w).completions.create(model=MODEL, prompt="hello", stream=stream)
        choices = [part.choices[0] async for part in answer] if stream else answer.choices
        kept = TOKENS[0] if text == "keep" else SORRY if style == "message" else ""
        assert "".join(choice.text for choice in choices) == kept
        assert choices[-1].finish_reason == REASONS[style]
        raw = await w.client.post(TEXTS, json=TEXT | {"stream": stream})
        assert STOPPED not in raw.text
        assert "refusal" not in raw.text


@pytest.mark.parametrize("stream", [False, True])
async def test_azures_client(stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, "azure") as w:
        client = AsyncAzureOpenAI(
            http_client=w.client, azure_endpoint="http://gateway", api_version="2024-10-21", api_key="none"
        )
        answer: Any = await client.chat.completions.create(
            model=MODEL, messages=CHAT["messages"], stream=stream
        )
        last = [part async for part in answer][-1].choices[0] if stream else answer.choices[0]
        assert last.finish_reason == "content_filter"
        assert last.content_filter_results["unsafe"] == {"filtered": True, "detected": True}
        assert not last.content_filter_results["violence"]["filtered"]


@pytest.mark.parametrize("text", ["keep", "withdraw"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_of_several_choices_only_the_stopped_one_differs(
    path: str, style: str, text: str, tmp_path: Path
) -> None:
    body = (CHAT if path == CHATS else TEXT) | {"n": 3}
    ends = [End(), End(1), End()]
    async with watched(tmp_path, style, text) as w:
        w.engine.stops_after = {1: 1}
        answer = (await w.client.post(path, json=body)).json()
        plain = whole(body, ends)
        for index in (0, 2):
            assert answer["choices"][index] == plain["choices"][index]
        assert answer["choices"][1]["finish_reason"] == REASONS[style]
        assert answer["usage"] == plain["usage"]

        raw = await w.client.post(path, json=body | {"stream": True})
        found, expected = chunks_of(raw.text), chunks_of(b"".join(stream_of(body, ends)).decode())
        assert [frame for frame in found if index_of(frame) != 1] == [
            frame for frame in expected if index_of(frame) != 1
        ]
        mine = [frame["choices"][0] for frame in found if index_of(frame) == 1]
        assert mine[-1]["finish_reason"] == REASONS[style]
        for shown in (answer["choices"][1], mine):
            assert (TOKENS[0] in json.dumps(shown)) == (text == "keep")


@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_choices_that_share_a_frame_are_told_apart(text: str, tmp_path: Path) -> None:
    async with watched(tmp_path, "content_filter", text) as w:
        w.engine.stops_after, w.engine.rewrite = {1: 1}, together
        frames = chunks_of((await w.client.post(CHATS, json=CHAT | {"stream": True, "n": 2})).text)
        said, refused, ended = ["", ""], ["", ""], ["", ""]
        for choice in (choice for frame in frames for choice in frame["choices"]):
            said[choice["index"]] += choice["delta"].get("content") or ""
            refused[choice["index"]] += choice["delta"].get("refusal") or ""
            ended[choice["index"]] += choice["finish_reason"] or ""
        assert said == [SECRET, TOKENS[0] if text == "keep" else ""]
        assert (refused, ended) == (["", SORRY], ["stop", "content_filter"])


@pytest.mark.parametrize("stream", [False, True])
async def test_half_a_json_object_is_not_parsed(stream: bool, tmp_path: Path) -> None:
    """A finish reason ``stop`` alone would have OpenAI's client parse what is there."""
    async with watched(tmp_path, "message") as w:
        wish: Any = {"model": MODEL, "messages": CHAT["messages"], "response_format": Word}
        if stream:
            async with sdk(w).chat.completions.stream(**wish) as events:
                # The SDK parses what has come so far leniently, which no beginning of an object fails.
                final = [event async for event in events if event.type in ("content.done", "refusal.done")]
            assert [getattr(event, "parsed", None) for event in final] == [None, None]
        else:
            answer = await sdk(w).chat.completions.parse(**wish)
            assert answer.choices[0].message.parsed is None
            assert answer.choices[0].message.refusal == SORRY


async def test_content_filter_is_what_the_sdk_knows_as_one(tmp_path: Path) -> None:
    async with watched(tmp_path, "content_filter") as w:
        with pytest.raises(openai.ContentFilterFinishReasonError):
            await sdk(w).chat.completions.parse(model=MODEL, messages=CHAT["messages"], response_format=Word)


def seal_of(nonce: str | None, keys: Keyring) -> str:
    return Stop(nonce=nonce, tokens=1, logit=9.0).reason(keys)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHATS, TEXTS])
@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_a_clients_own_stop_string_stops_nothing(
    text: str, path: str, stream: bool, tmp_path: Path
) -> None:
    """What a client has matched as its stop string comes back as it is, even a seal it has got hold of."""
    body = (CHAT if path == CHATS else TEXT) | {"stream": stream}
    async with watched(tmp_path, "content_filter", text) as w:
        w.engine.stops_after = {}
        keys = w.engine.keys
        await w.client.post(path, json=body)
        earlier = w.engine.seen[0].directive.nonce
        for reason in (
            STOPPED,
            f"{STOPPED}:",
            f"{STOPPED}:k1.e30.AAAA",
            seal_of(earlier, keys),
            seal_of(None, keys),
            seal_of(earlier, Keyring.generate()),
            f"{STOPPED}:{keys.seal('verdict', b'{}')}",
            f"{STOPPED}:{keys.seal('stop', b'{}')}",
        ):
            w.engine.stop_reason = reason
            raw = await w.client.post(path, json=body | {"stop": reason})
            ends = [End(stop_reason=reason)]
            expected = b"".join(stream_of(body, ends)) if stream else json.dumps(whole(body, ends)).encode()
            assert raw.content == expected
            assert raw.headers["x-guard-action"] == "pass"
        assert w.total("guard_answers_stopped_total") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_what_was_not_stopped_is_the_engines_bytes(text: str, stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, "content_filter", text) as w:
        w.engine.stops_after = {}
        body = CHAT | ({"n": 2} | STREAM if stream else {"n": 2})
        raw = await w.client.post(CHATS, json=body)
        ends = [End(), End()]
        assert raw.content == (
            b"".join(stream_of(body, ends)) if stream else json.dumps(whole(body, ends)).encode()
        )
        assert (raw.headers["x-guard-action"], SECRET in raw.text.replace('"}', "")) == ("pass", not stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_only_observed_is_answered(stream: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, "error", "withdraw", "mode: observe, ") as w:
        answer: Any = await w.client.post(CHATS, json=CHAT | {"stream": stream})
        assert (answer.status_code, answer.headers["x-guard-action"]) == (200, "pass")
        assert TOKENS[1] in answer.text
        assert w.engine.seen[0].directive.decision.monitor is not None  # the engine counts what it would do


@pytest.mark.parametrize(("mode", "watches"), [("observe", False), ("enforce", True)])
async def test_blocking_inputs_does_not_enforce_an_observing_policys_monitor(
    mode: str, watches: bool, tmp_path: Path
) -> None:
    wish = {"moderation": {"model": "m", "policy": {"input": {"mode": "block"}}}}
    async with watched(tmp_path, "message", "keep", f"mode: {mode}, ") as w:
        answer = await w.client.post(CHATS, json=CHAT | wish)
        assert (answer.headers["x-guard-action"] == "stop") is watches
        decision = w.engine.seen[0].directive.decision
        assert (decision.mode, decision.monitor is not None) == ("enforce", watches)


@pytest.mark.parametrize("text", ["keep", "withdraw"])
async def test_the_moderation_finding_stands_beside_a_stop(text: str, tmp_path: Path) -> None:
    async with watched(tmp_path, "message", text) as w:
        body = CHAT | {"moderation": {"model": "m"}}
        answer = (await w.client.post(CHATS, json=body)).json()
        assert (answer["choices"][0]["message"]["refusal"], "moderation" in answer) == (SORRY, True)
        frames = chunks_of((await w.client.post(CHATS, json=body | {"stream": True})).text)
        assert ["moderation" in frame for frame in frames] == [*[False] * (len(frames) - 1), True]
