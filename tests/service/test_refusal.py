import json
from typing import Any, Literal

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from service.policy import Refusal
from service.refusal import RefusedAnswer
from service.stream import AnswerWatch, SseDecoder, data_of

TEXT = "I can't help with that."


def refused(route: Literal["chat", "text"], style: Any, n: int = 1) -> RefusedAnswer:
    refusal = Refusal(style=style, text=TEXT)
    return RefusedAnswer(
        route=route, refusal=refusal, request_id="r1", model="m", siblings=n, prompt_tokens=9
    )


def chunks(answer: RefusedAnswer, include_usage: bool) -> list[dict[str, Any]]:
    frames = list(answer.frames(include_usage=include_usage))
    assert frames[-1] == b"data: [DONE]\n\n"
    assert SseDecoder().decode(b"".join(frames)) == frames
    return [json.loads(data_of(frame) or b"") for frame in frames[:-1]]


@pytest.mark.parametrize(
    ("style", "content", "reason"), [("message", TEXT, "stop"), ("content_filter", "", "content_filter")]
)
def test_chat_answer(style: str, content: str, reason: str) -> None:
    answer = ChatCompletion.model_validate(refused("chat", style, n=3).body())
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert (choice.message.content, choice.message.refusal) == (content, TEXT)
        assert choice.finish_reason == reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        9,
        0,
        9,
    )


@pytest.mark.parametrize(
    ("style", "text", "reason"), [("message", TEXT, "stop"), ("content_filter", "", "content_filter")]
)
def test_text_answer(style: str, text: str, reason: str) -> None:
    answer = Completion.model_validate(refused("text", style, n=2).body())
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, text, reason),
        (1, text, reason),
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("style", ["message", "content_filter"])
@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_chat_stream_says_what_the_answer_says(style: str, include_usage: bool, n: int) -> None:
    answer = refused("chat", style, n)
    parts = [ChatCompletionChunk.model_validate(value) for value in chunks(answer, include_usage)]
    if include_usage:
        last = parts.pop()
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.model_dump(exclude_unset=True) == answer.body()["usage"]
    assert all(part.usage is None for part in parts)
    for expected in answer.body()["choices"]:
        mine = [part.choices[0] for part in parts if part.choices[0].index == expected["index"]]
        assert mine[0].delta.role == "assistant"
        assert mine[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in mine) == expected["message"]["content"]
        assert "".join(choice.delta.refusal or "" for choice in mine) == expected["message"]["refusal"]
        assert [choice.finish_reason for choice in mine] == [None, None, expected["finish_reason"]]


@pytest.mark.parametrize("style", ["message", "content_filter"])
def test_text_stream_says_what_the_answer_says(style: str) -> None:
    answer = refused("text", style, n=2)
    choices = [value["choices"][0] for value in chunks(answer, include_usage=False)]
    for expected in answer.body()["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine] == [None, expected["finish_reason"]]


def test_usage_is_null_in_the_other_frames_as_openai_has_it() -> None:
    values = chunks(refused("chat", "message"), include_usage=True)
    assert [value["usage"] for value in values[:-1]] == [None] * 3
    assert all("usage" not in value for value in chunks(refused("chat", "message"), include_usage=False))


def test_the_gateways_own_watch_accepts_its_refusals() -> None:
    watch = AnswerWatch()
    for frame in refused("chat", "message").frames(include_usage=True):
        watch.look(frame)
    assert watch.finished
    assert not watch.failed
