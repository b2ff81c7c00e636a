"""Answers that are stopped as they grow, over HTTP: openai client, gateway, guarded vLLM."""

from __future__ import annotations

import contextlib
import hashlib

import httpx
import numpy as np
import openai
import pytest
import torch

from guard.monitor import STOPPED, MonitorThreshold
from guard.pooling import Pooling
from loadtests.random_model import with_sequence_probe
from tests.e2e import servers
from tests.e2e.test_stack import metric
from tests.engine import world

TOKENS, DEBOUNCE = 24, 2
POOLING = Pooling(kind="rolling", window=6)
POLICIES = {
    "keep": {"refusal": {"style": "content_filter", "text": "No."}},
    "withdraw": {"refusal": {"style": "content_filter", "text": "No."}},
    "observe": {"mode": "observe"},
}


@pytest.fixture(scope="module")
def probed(tiny_bundle, reference):
    return with_sequence_probe(tiny_bundle, reference, POOLING, world.prompts(60, seed=1000))


@pytest.fixture(scope="module")
def grown(reference, probed, everyday):
    """``{message: pooled score after each token of its answer}``, by transformers, of messages that pass."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(reference.model.name_or_path), {}
    for text in everyday[:30]:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if probed.sequence.logit(reference.features_of_all(prompt)) > -0.05:
            continue
        whole = reference.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )[0].tolist()
        found[text] = probed.sequence.running(reference.features_of_all(whole[:-1]))[len(prompt) :]
    assert len(found) >= 8
    return found


@pytest.fixture(scope="module")
def limit(grown):
    """A limit that no score lies near, with some answers on both sides of it."""
    values = np.sort(np.concatenate(list(grown.values())))
    upper = values[int(0.6 * len(values)) : int(0.9 * len(values))]
    gap = int(np.argmax(np.diff(upper)))
    return float((upper[gap] + upper[gap + 1]) / 2)


@pytest.fixture(scope="module")
def cuts(grown, limit):
    """After how many tokens each answer must be stopped, found by a plain loop; None: never."""
    found = {}
    for text, values in grown.items():
        counts = [all(v >= limit for v in values[i : i + DEBOUNCE]) for i in range(TOKENS - DEBOUNCE)]
        found[text] = counts.index(True) + DEBOUNCE if True in counts else None
    assert 2 <= sum(cut is not None for cut in found.values()) < len(found)
    return found


@pytest.fixture(scope="module")
def clients(probed, limit, tiny_model, key_file, tmp_path_factory):
    """By policy, and the engine's URL."""
    folder = tmp_path_factory.mktemp("monitor")
    known = MonitorThreshold(
        false_positive_rate=0.01, debounce=DEBOUNCE, logit=limit, answers=500, upper95=0.02
    )
    card = probed.card.model_copy(update={"monitor": (known,)})
    bundle = type(probed)(card, probed.probe, probed.patches.values()).save(folder / "bundle")
    policies = {
        name: {**policy, "monitor": {"fpr": 0.01, "debounce": DEBOUNCE, "text": "keep"}}
        for name, policy in POLICIES.items()
    }
    policies["withdraw"]["monitor"]["text"] = "withdraw"
    keys = [
        {"sha256": hashlib.sha256(f"sk-{name}".encode()).hexdigest(), "tenant": "tests", "policy": name}
        for name in policies
    ]
    with contextlib.ExitStack() as running:
        engine = running.enter_context(
            servers.engine(tiny_model, bundle, key_file, "tiny", folder / "engine.log")
        )
        gateway = running.enter_context(
            servers.gateway(engine, key_file, folder, {"policies": policies, "keys": keys})
        )
        made = {
            name: running.enter_context(
                openai.OpenAI(base_url=f"{gateway}/v1", api_key=f"sk-{name}", max_retries=0)
            )
            for name in policies
        }
        yield made, engine


def ask(client, text, *, stream):
    """``(text so far, finish reason, tokens)``."""
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "extra_body": {"ignore_eos": True},
    }
    if not stream:
        answer = client.chat.completions.create(**request)
        assert STOPPED not in answer.model_dump_json()
        (choice,) = answer.choices
        return choice.message.content or "", choice.finish_reason, answer.usage.completion_tokens
    said, reason, tokens = "", None, None
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        assert STOPPED not in chunk.model_dump_json()
        for choice in chunk.choices:
            assert reason is None, "nothing comes after the end"
            said += choice.delta.content or ""
            reason = choice.finish_reason
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return said, reason, tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["keep", "withdraw"])
def test_answers_end_where_the_offline_scores_say(clients, cuts, name, stream):
    made, engine = clients
    before = metric(engine, "guard_engine_stops_total", outcome="stopped", source="gateway")
    for text, cut in cuts.items():
        whole = ask(made["observe"], text, stream=stream)
        said, reason, tokens = ask(made[name], text, stream=stream)
        if cut is None:
            assert (said, reason, tokens) == whole
            continue
        assert (reason, tokens) == ("content_filter", cut)
        if name == "withdraw":
            assert said == ""
        else:
            # What is not a whole character yet is shown by one and kept back by the other.
            assert whole[0].startswith(said.rstrip("\ufffd"))
    stopped = metric(engine, "guard_engine_stops_total", outcome="stopped", source="gateway") - before
    assert stopped == sum(cut is not None for cut in cuts.values())


def test_observed_answers_are_whole_and_counted(clients, cuts):
    made, engine = clients
    before = metric(engine, "guard_engine_stops_total", outcome="observed", source="gateway")
    answers = [ask(made["observe"], text, stream=False) for text in cuts]
    assert {(reason, tokens) for _, reason, tokens in answers} == {("length", TOKENS)}
    observed = metric(engine, "guard_engine_stops_total", outcome="observed", source="gateway") - before
    assert observed == sum(cut is not None for cut in cuts.values())


def test_status_says_where_the_engine_can_stop(clients, limit):
    (threshold,) = httpx.get(f"{clients[1]}/guard/status").json()["monitor"]
    assert (threshold["debounce"], threshold["logit"]) == (DEBOUNCE, pytest.approx(limit))
