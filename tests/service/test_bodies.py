import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.errors import ApiError
from service.fields import ADVICE, validate

USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}

ACCEPTED: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
    "max_tokens": 5,
    "seed": 1,
    "stop": ["a"],
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"1": -100},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "structured_outputs": {"json": {"type": "object"}},
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [1],
    "allowed_token_ids": [1, 2],
    "bad_words": ["x"],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": True,
}
CHAT_ONLY: dict[str, Any] = {
    "max_completion_tokens": 5,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": [1]}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
}
DROPPED: dict[str, Any] = {
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "p",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
}
REFUSED = [
    "vllm_xargs",
    "cache_salt",
    "kv_transfer_params",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "echo",
    "prompt_logprobs",
    "suffix",
    "best_of",
    "use_beam_search",
    "request_id",
    "priority",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "documents",
    "prompt_embeds",
    "mm_processor_kwargs",
    "return_token_ids",
    "temprature",
]


def forwarded(model: type, body: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(validate(model, body).forwarded())
    return value


def refused(model: type, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        validate(model, body)
    assert caught.value.status == 400
    return caught.value


def test_every_accepted_field_is_forwarded_as_it_was_sent() -> None:
    chat = CHAT | ACCEPTED | CHAT_ONLY
    assert forwarded(ChatBody, chat) == chat
    text = TEXT | ACCEPTED | {"logprobs": 3}
    assert forwarded(CompletionBody, text) == text


def test_nothing_is_added() -> None:
    assert forwarded(ChatBody, CHAT) == CHAT
    assert forwarded(CompletionBody, TEXT) == TEXT


@pytest.mark.parametrize(("model", "body"), [(ChatBody, CHAT), (CompletionBody, TEXT)])
def test_what_nobody_behind_needs_is_dropped(model: type, body: dict[str, Any]) -> None:
    assert forwarded(model, body | DROPPED) == body


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("model", "body"), [(ChatBody, CHAT), (CompletionBody, TEXT)])
def test_other_fields_are_refused_by_name_with_advice(name: str, model: type, body: dict[str, Any]) -> None:
    for value in ({"a": 1}, None, True, "x", 1):
        error = refused(model, body | {name: value})
        assert error.param == name
        assert error.code == "unknown_parameter"
        assert f"'{name}'" in error.message
        assert ADVICE.get(name, "Remove it") in error.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        ({"messages": [USER | {"prefix": True}]}, "messages[0].prefix"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 1.0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stop": [1]}, "stop[0]"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"model": None}, "model"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"store": True}, "store"),
    ],
)
def test_the_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    assert refused(ChatBody, CHAT | {"stream": True} | change).param == param


def test_images_are_refused_since_the_guard_reads_text() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    error = refused(ChatBody, CHAT | {"messages": [{"role": "user", "content": [part]}]})
    assert error.param == "messages[0].content[0].image_url"
    assert "Only text" in error.message


def test_an_answer_cannot_be_prefilled() -> None:
    error = refused(ChatBody, CHAT | {"messages": [USER, {"role": "assistant", "content": "Sure, here"}]})
    assert "prefilling" in error.message
    assert forwarded(ChatBody, CHAT | {"messages": [USER, {"role": "assistant", "content": "a"}, USER]})


def test_an_answers_message_can_be_sent_back() -> None:
    answer = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning": None,
        "tool_calls": None,
    }
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    tool = {"role": "assistant", "content": None, "tool_calls": calls}
    result = {"role": "tool", "content": "4", "tool_call_id": "1"}
    sent = forwarded(ChatBody, CHAT | {"messages": [USER, answer, USER, tool, result]})
    assert sent["messages"][1]["content"] == "x"
    assert "annotations" not in sent["messages"][1]
    assert sent["messages"][3:] == [tool, result]


def test_stream_options_need_a_stream() -> None:
    assert "stream" in refused(ChatBody, CHAT | {"stream_options": {"include_usage": True}}).message


@pytest.mark.parametrize(
    ("prompt", "n", "siblings"),
    [("a", None, 1), ([1, 2, 3], 2, 2), (["a", "b"], 3, 6), ([[1], [2], [3]], 1, 3)],
)
def test_siblings_are_prompts_times_n(prompt: Any, n: int | None, siblings: int) -> None:
    assert validate(CompletionBody, TEXT | {"prompt": prompt, "n": n}).siblings == siblings


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "a"], [[1], "a"], [-1], None, {"a": 1}, [1.5], [True]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    param = refused(CompletionBody, TEXT | {"prompt": prompt}).param
    assert param is not None
    assert param.startswith("prompt")


names = st.sampled_from([*ACCEPTED, *CHAT_ONLY, *DROPPED, *REFUSED, "messages", "model"]) | st.text(
    max_size=8
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, values, max_size=5), st.booleans())
def test_any_body_is_forwarded_within_the_list_or_refused_as_a_400(body: dict[str, Any], valid: bool) -> None:
    with suppress(ApiError):  # any other exception fails the test
        sent = json.loads(validate(ChatBody, (CHAT if valid else {}) | body).forwarded())
        assert set(sent) <= {"model", "messages", *ACCEPTED, *CHAT_ONLY}
        assert {name: body[name] for name in body if name in sent} == {n: sent[n] for n in body if n in sent}


def test_text_that_is_not_unicode_is_a_400() -> None:
    for body in (
        CHAT | {"messages": [{"role": "user", "content": "\ud800"}]},
        CHAT | {"model": "\ud800"},
        CHAT | {"\ud800": 1},
        CHAT | {"messages": [{"role": "\ud800", "content": ""}]},
        CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}]},
    ):
        with pytest.raises(ApiError) as caught:
            validate(ChatBody, body).forwarded()
        assert caught.value.response().status_code == 400
