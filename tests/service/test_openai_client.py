"""The official client against the gateway, sync and async."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.service.fake_engine import DIE, HARMFUL, MODEL, SECRET, chunk
from tests.service.world import Live, live

HI = [{"role": "user", "content": "hello"}]
BAD = [{"role": "user", "content": HARMFUL}]
TEXT = "I can't help with that."


@pytest.fixture
def client(gate: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=gate.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def _filtering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("filtering")
    with live(folder, "policies: {default: {refusal: {style: content_filter}}}") as running:
        yield running


@pytest.fixture
def filtered(_filtering: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=_filtering.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


class Answer(BaseModel):
    word: str


def test_a_passed_answer(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, user="u", metadata={"a": "b"}
    )
    assert raw.headers["x-guard-action"] == "pass"
    assert raw.parse().choices[0].message.content == SECRET


def test_a_refused_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=BAD, n=2)
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.message.refusal for choice in answer.choices] == [TEXT, TEXT]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_streams(client: OpenAI) -> None:
    for messages, content in ((HI, SECRET), (BAD, TEXT)):
        options = {"include_usage": True}
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options=options
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == (0 if messages is BAD else 2)


def test_the_streaming_helper(client: OpenAI) -> None:
    for messages, content in ((HI, SECRET), (BAD, TEXT)):
        with client.chat.completions.stream(model=MODEL, messages=messages) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert final.choices[0].message.content == content
        assert ("refusal.done" in kinds) == (messages is BAD)
        assert final.choices[0].message.refusal == (TEXT if messages is BAD else None)


def test_parse(client: OpenAI, gate: Live) -> None:
    message = {"role": "assistant", "content": '{"word": "yes"}', "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    gate.engine.answer = json.dumps(
        {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
    ).encode()
    parsed = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(word="yes")
    refused = client.chat.completions.parse(model=MODEL, messages=BAD, response_format=Answer)
    assert refused.choices[0].message.parsed is None
    assert refused.choices[0].message.refusal == TEXT


def test_the_streaming_helper_with_a_response_format(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=BAD, response_format=Answer) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed is None
    assert final.choices[0].message.refusal == TEXT


def test_content_filter_is_what_the_sdk_knows_as_one(filtered: OpenAI) -> None:
    answer = filtered.chat.completions.create(model=MODEL, messages=BAD)
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].message.refusal == TEXT
    with pytest.raises(openai.ContentFilterFinishReasonError):
        filtered.chat.completions.parse(model=MODEL, messages=BAD, response_format=Answer)
    with (
        pytest.raises(openai.ContentFilterFinishReasonError),
        filtered.chat.completions.stream(model=MODEL, messages=BAD, response_format=Answer) as stream,
    ):
        stream.until_done()


def test_text_completions(client: OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="hello").choices[0].text == SECRET
    refused = client.completions.create(model=MODEL, prompt=["hello", HARMFUL], n=2)
    assert [choice.text for choice in refused.choices] == [TEXT] * 4
    for prompt, text in (("hello", SECRET), (HARMFUL, TEXT)):
        stream = client.completions.create(model=MODEL, prompt=prompt, stream=True)
        assert "".join(part.choices[0].text for part in stream) == text


def test_models_and_moderations(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-x")
    results = client.moderations.create(input=["hello", HARMFUL]).results
    assert [result.flagged for result in results] == [False, True]


def test_errors_are_the_sdks_own(client: OpenAI, gate: Live) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"vllm_xargs": {}})
    assert (bad.value.param, bad.value.code) == ("vllm_xargs", "unknown_parameter")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-x", messages=HI)
    gate.engine.seal = lambda verdict: None
    with pytest.raises(openai.InternalServerError) as closed:
        client.chat.completions.create(model=MODEL, messages=HI)
    assert (closed.value.status_code, closed.value.code) == (503, "guard_no_verdict")


def test_a_stream_that_breaks_off_raises(client: OpenAI, gate: Live) -> None:
    gate.engine.stream = [chunk("one"), 0.02, DIE]
    with pytest.raises(openai.APIError, match="cut off"):
        list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))


async def test_the_async_client(gate: Live) -> None:
    async with AsyncOpenAI(base_url=gate.url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=BAD)
        assert answer.choices[0].message.refusal == TEXT
        async with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == SECRET
        parts = [
            part async for part in await client.completions.create(model=MODEL, prompt="hello", stream=True)
        ]
        assert "".join(part.choices[0].text for part in parts) == SECRET
