"""Answers that are stopped as they grow, over HTTP: openai client, gateway, guarded vLLM with a monitor."""

from __future__ import annotations

import hashlib

import httpx
import numpy as np
import openai
import pytest
import torch

from guard.bundle import Bundle
from guard.monitor import STOPPED, MonitorThreshold
from guard.pooling import Pooling
from loadtests.random_model import with_sequence_probe
from tests.e2e import servers
from tests.e2e.test_stack import metric
from tests.engine import world

ALWAYS = MonitorThreshold(false_positive_rate=0.5, debounce=3, logit=-1e9, answers=9, upper95=0.8)
"""Reached by every token, so that each answer ends after three of them."""
NEVER = MonitorThreshold(false_positive_rate=0.01, debounce=1, logit=1e9, answers=9, upper95=0.3)
_PASS = {"rules": [{"above": 0.0, "action": "pass"}]}
_AT_ONCE = {"fpr": 0.5, "debounce": 3}
POLICIES = {
    "plain": _PASS,
    "keep": _PASS | {"monitor": _AT_ONCE, "refusal": {"style": "content_filter", "text": "No."}},
    "withdraw": _PASS | {"monitor": _AT_ONCE | {"text": "withdraw"}, "refusal": {"style": "error"}},
    "never": _PASS | {"monitor": {"fpr": 0.01, "debounce": 1, "text": "withdraw"}},
    "observe": _PASS | {"monitor": _AT_ONCE, "mode": "observe"},
    "between": _PASS | {"monitor": {"fpr": 0.01, "debounce": 2}, "refusal": {"style": "content_filter"}},
}
TOKENS = 24
"""Of the answers that some of the scores stop."""
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
TEXT = {"model": "tiny", "prompt": "hello there", "max_tokens": 9}
EXACT = {"top_k": 1, "ignore_eos": True}  # of greedy answers vLLM gives one only


@pytest.fixture(scope="module")
def probed(tiny_bundle, reference):
    return with_sequence_probe(
        tiny_bundle, reference, Pooling(kind="rolling", window=4), world.prompts(30, seed=71)
    )


@pytest.fixture(scope="module")
def grown(reference, probed, everyday):
    """``{message: pooled score after each token of its answer but the last}``, by transformers."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(reference.model.name_or_path), {}
    for text in everyday[:16]:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        whole = list(prompt)
        for _ in range(TOKENS):  # whatever the token, the end among them
            with torch.no_grad():
                whole.append(int(reference.model(torch.tensor([whole])).logits[0, -1].argmax()))
        found[text] = probed.sequence.running(reference.features_of_all(whole[:-1]))[len(prompt) :]
    return found


@pytest.fixture(scope="module")
def between(grown):
    """A limit that no score lies near, with some answers on both sides of it."""
    values = np.sort(np.concatenate(list(grown.values())))
    upper = values[int(0.6 * len(values)) : int(0.9 * len(values))]
    gap = int(np.argmax(np.diff(upper)))
    return MonitorThreshold(
        false_positive_rate=0.01,
        debounce=2,
        logit=float((upper[gap] + upper[gap + 1]) / 2),
        answers=9,
        upper95=0.3,
    )


@pytest.fixture(scope="module")
def watching(probed, between, tiny_model, key_file, tmp_path_factory):
    """A guarded server whose bundle has a monitor, and a gateway with a policy of each kind."""
    folder = tmp_path_factory.mktemp("stopping")
    card = probed.card.model_copy(update={"monitor": (ALWAYS, NEVER, between)})
    bundle = Bundle(card, probed.probe, probed.patches.values())
    keys = [
        {"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": "tests", "policy": name}
        for name in POLICIES
    ]
    saved = bundle.save(folder / "bundle")
    with (
        servers.engine(tiny_model, saved, key_file, "tiny", folder / "engine.log") as engine,
        servers.gateway(engine, key_file, folder, {"policies": POLICIES, "keys": keys}) as gateway,
    ):
        yield servers.Stack(engine, gateway, folder)


@pytest.fixture
def post(watching):
    def send(key, body, **more):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(watching.gateway + path, json=body | EXACT | more, headers=headers, timeout=60)

    return send


def said(answer):
    choices = answer.json()["choices"]
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "text"])
def test_a_stopped_answer_is_the_beginning_of_the_whole_one(post, body):
    stopped = post("keep", body, n=2)
    assert said(stopped) == said(post("plain", body, max_tokens=3, n=2))
    assert stopped.headers["x-guard-action"] == "stop"
    assert STOPPED not in stopped.text
    assert [choice["finish_reason"] for choice in stopped.json()["choices"]] == ["content_filter"] * 2
    assert stopped.json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_where_the_offline_scores_say(watching, grown, between, stream):
    cuts = {}
    for text, values in grown.items():
        counts = [bool((values[i : i + 2] >= between.logit).all()) for i in range(TOKENS - 2)]
        cuts[text] = counts.index(True) + 2 if True in counts else TOKENS
    assert 2 <= sum(cut < TOKENS for cut in cuts.values()) < len(cuts)
    more = {"max_tokens": TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}, "stream": stream}
    if stream:
        more["stream_options"] = {"include_usage": True}
    with openai.OpenAI(base_url=f"{watching.gateway}/v1", api_key="between", max_retries=0) as client:
        for text, cut in cuts.items():
            messages = [{"role": "user", "content": text}]
            answer = client.chat.completions.create(model="tiny", messages=messages, **more)
            parts = list(answer) if stream else [answer]
            (reason,) = {c.finish_reason for part in parts for c in part.choices} - {None}
            assert reason == ("length" if cut == TOKENS else "content_filter")
            assert parts[-1].usage.completion_tokens == cut


@pytest.mark.parametrize("name", ["keep", "plain"])
def test_a_stopped_stream_ends_as_openais_client_knows_it(watching, name):
    more = {"extra_body": {"ignore_eos": True}, "temperature": 0.0, "stream_options": {"include_usage": True}}
    with openai.OpenAI(base_url=f"{watching.gateway}/v1", api_key=name, max_retries=0) as client:
        limit = 3 if name == "plain" else 9
        chat = list(client.chat.completions.create(**CHAT | {"max_tokens": limit}, stream=True, **more))
        text = list(client.completions.create(**TEXT | {"max_tokens": limit}, stream=True, **more))
    reason = {"keep": "content_filter", "plain": "length"}[name]
    for parts in (chat, text):
        assert [c.choices[0].finish_reason for c in parts if c.choices][-1] == reason
        assert parts[-1].usage.completion_tokens == 3
    refusals = [c.choices[0].delta.refusal for c in chat if c.choices and c.choices[0].delta.refusal]
    assert refusals == (["No."] if name == "keep" else [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "text"])
def test_a_withdrawn_answer_shows_nothing(post, body, stream):
    answer = post("withdraw", body, stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "content_policy_violation")
    assert answer.headers["x-guard-action"] == "stop"


@pytest.mark.parametrize("name", ["never", "observe"])
@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "text"])
def test_what_is_not_stopped_is_the_whole_answer(post, body, name):
    assert said(post(name, body)) == said(post("plain", body))
    frames = post(name, body, stream=True).text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"length"' in frames[-3]


def test_engine_and_gateway_count_the_same_stops(watching, post):
    def counts():
        return (
            metric(watching.engine, "guard_engine_stops_total", outcome="stopped", source="gateway"),
            metric(watching.engine, "guard_engine_stops_total", outcome="observed", source="gateway"),
            metric(watching.gateway, "guard_answers_stopped_total"),
        )

    before = counts()
    post("keep", CHAT, n=3, stream=True)
    post("withdraw", TEXT)
    post("observe", CHAT, n=2)
    assert [after - then for after, then in zip(counts(), before, strict=True)] == [4, 2, 4]
    assert metric(watching.gateway, "guard_bypass_total") == 0
