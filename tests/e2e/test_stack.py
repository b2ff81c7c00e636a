"""The whole path over HTTP: openai client, gateway, guarded vLLM, on a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard.engine.config import EXTRA_ARG
from guard.sealed import Keyring
from guard.verdict import DIRECTIVE_HEADER, VERDICT_HEADER, Decision, Directive, EngineStatus, Rule
from tests.e2e import patched_world, servers
from tests.e2e.servers import API_KEYS
from tests.engine import world

BEARER = {"authorization": f"Bearer {API_KEYS['message']}"}
CANARY = "model text must not be here"


@pytest.fixture
def client(stack):
    with openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key=API_KEYS["message"], max_retries=0) as made:
        yield made


def raw(stack, path, body, *, key="message", base=None, headers=None):
    """Raw bytes and headers of one answer."""
    auth = {"authorization": f"Bearer {API_KEYS[key]}"} if base is None else {}
    return httpx.post(
        (base or stack.gateway) + path, json=body, headers={**auth, **(headers or {})}, timeout=60.0
    )


def metric(url, name, **labels):
    """Sum of the samples of a metric at a server."""
    total = 0.0
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


class TestPatched:
    """Flagged requests are answered by the patched model, or begin with given words."""

    @pytest.fixture(scope="class")
    def gateways(self, stack, key_file, tmp_path_factory):
        with contextlib.ExitStack() as running:
            found = {}
            for name in ("quiet", "begun"):
                rule = {"above": {"fpr": 0.01}, "action": "patch", "patch": name, "still_unsafe": "pass"}
                served = servers.POLICIES | {"policies": {"message": {"rules": [rule]}}}
                served["keys"] = [key for key in served["keys"] if key["policy"] == "message"]
                folder = tmp_path_factory.mktemp(name)
                found[name] = running.enter_context(servers.gateway(stack.engine, key_file, folder, served))
            yield found

    @pytest.mark.parametrize("name", ["quiet", "begun"])
    def test_only_flagged_requests_are_patched_streamed_or_not(
        self, gateways, stack, chats, reference, tiny_bundle, name
    ):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(reference.model.name_or_path)
        for text, patch in zip(chats, (tiny_bundle.patches[name], None), strict=True):
            prompt = tokenizer.apply_chat_template([user(text)], add_generation_prompt=True)["input_ids"]
            (expected,) = patched_world.answers(reference.model, patch, [tuple(prompt)])
            body = {"model": "tiny", "messages": [user(text)], "max_tokens": 12, "temperature": 0.0}
            whole = raw(stack, "/v1/chat/completions", body, base=gateways[name], headers=BEARER)
            assert whole.headers["x-guard-action"] == ("patch" if patch else "pass")
            assert whole.headers.get("x-guard-patch") == (name if patch else None)
            said = whole.json()["choices"][0]["message"]["content"]
            # An unfinished character at the end is shown by one and kept back by the other.
            assert said.rstrip("\ufffd") == tokenizer.decode(expected, skip_special_tokens=True).rstrip(
                "\ufffd"
            )
            with openai.OpenAI(
                base_url=f"{gateways[name]}/v1", api_key=API_KEYS["message"], max_retries=0
            ) as client:
                stream = client.chat.completions.create(**body, stream=True)
                parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
            assert "".join(parts) == said
        assert metric(gateways[name], "guard_requests_total", action="patch") == 2
        assert metric(gateways[name], "guard_requests_total", action="pass") == 2
        assert metric(gateways[name], "guard_bypass_total") == 0


class TestOpenAIClient:
    def test_chat_passes_and_refuses(self, client, chats):
        unsafe, safe = chats
        answer = client.chat.completions.create(model="tiny", messages=[user(safe)], max_tokens=8)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.usage.completion_tokens > 0
        refused = client.chat.completions.create(model="tiny", messages=[user(unsafe)], max_tokens=8)
        message = refused.choices[0].message
        assert message.content == message.refusal == "I can't help with that."
        assert refused.choices[0].finish_reason == "stop"
        assert refused.usage.completion_tokens == 0
        assert refused.usage.prompt_tokens > 5

    def test_chat_streams(self, client, chats):
        for text, refused in zip(chats, (True, False), strict=True):
            stream = client.chat.completions.create(
                model="tiny",
                messages=[user(text)],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert (said == "I can't help with that.") == refused
            assert (chunks[-1].usage.completion_tokens == 0) == refused

    def test_streaming_helper_sees_both_outcomes(self, client, chats):
        for text, refused in zip(chats, (True, False), strict=True):
            with client.chat.completions.stream(model="tiny", messages=[user(text)], max_tokens=8) as stream:
                kinds = {event.type for event in stream}
            assert "content.delta" in kinds
            assert ("refusal.done" in kinds) == refused

    def test_content_filter_style_raises_where_the_sdk_says_so(self, stack, chats):
        filtered = openai.OpenAI(
            base_url=f"{stack.gateway}/v1", api_key=API_KEYS["content_filter"], max_retries=0
        )
        with filtered:
            got = filtered.chat.completions.create(model="tiny", messages=[user(chats[0])], max_tokens=8)
            assert got.choices[0].finish_reason == "content_filter"
            with pytest.raises(openai.ContentFilterFinishReasonError):
                filtered.chat.completions.parse(model="tiny", messages=[user(chats[0])], max_tokens=8)

    async def test_async_client(self, stack, chats):
        async with openai.AsyncOpenAI(
            base_url=f"{stack.gateway}/v1", api_key=API_KEYS["message"], max_retries=0
        ) as client:
            got = await client.chat.completions.create(model="tiny", messages=[user(chats[0])], max_tokens=4)
            assert got.choices[0].message.refusal
            stream = await client.chat.completions.create(
                model="tiny", messages=[user(chats[1])], max_tokens=4, stream=True
            )
            assert [chunk async for chunk in stream]

    def test_models_and_moderations(self, client, chats):
        assert [m.id for m in client.models.list()] == ["tiny"]
        flagged = client.moderations.create(model="tiny", input=list(chats))
        assert [result.flagged for result in flagged.results] == [True, False]

    def test_several_answers_share_one_verdict(self, client, chats):
        unsafe, safe = chats
        got = client.chat.completions.create(
            model="tiny", messages=[user(safe)], n=3, temperature=1.0, max_tokens=4
        )
        assert len(got.choices) == 3
        got = client.chat.completions.create(model="tiny", messages=[user(unsafe)], n=3, max_tokens=4)
        assert [c.message.refusal for c in got.choices] == ["I can't help with that."] * 3

    def test_over_long_prompt_and_unknown_model(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[user("long " * 400)], max_tokens=4)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=[user("hello")])
        assert missing.value.code == "model_not_found"


def user(text):
    return {"role": "user", "content": text}


class TestSilence:
    """A refused request shows no token of the model, in any style, streamed or not."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("key", ["message", "content_filter"])
    def test_raw_bytes_of_a_refusal_are_the_same_whatever_the_model_would_say(
        self, stack, prompts, reference, tiny_bundle, key, stream
    ):
        """Two unsafe prompts of one length whose answers differ give the same bytes, ids and times aside."""
        pair = self.two_unsafe(reference, tiny_bundle)
        bodies = []
        for prompt in pair:
            body = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": 12,
                "temperature": 0,
                "stream": stream,
                "logprobs": 2,
            }
            said = raw(stack, "/v1/completions", body, key="observe").text
            got = raw(stack, "/v1/completions", body, key=key)
            assert got.headers["x-guard-action"] == "refuse"
            assert said != got.text
            bodies.append(scrub(got.text))
        assert bodies[0] == bodies[1]
        assert '"completion_tokens":0' in bodies[0].replace(" ", "") or stream

    @staticmethod
    def two_unsafe(reference, tiny_bundle):
        rng = random.Random(3)
        found = []
        while len(found) < 2:
            prompt = [*(rng.randrange(256) for _ in range(40)), *world.TAIL]
            if float(tiny_bundle.logits(reference.features(prompt)[None])[0]) > 0.3:
                found.append(prompt)
        return found

    @pytest.mark.parametrize("stream", [False, True])
    def test_vllms_own_port_is_silent_too(self, stack, prompts, stream):
        body = {"model": "tiny", "prompt": prompts[0], "max_tokens": 12, "stream": stream, "ignore_eos": True}
        got = raw(stack, "/v1/completions", body, base=stack.engine)
        frames = [json.loads(f.removeprefix("data: ")) for f in got.text.split("\n\n") if "{" in f]
        texts = [c["text"] for frame in frames for c in frame["choices"]]
        assert set(texts) == {""}
        assert frames[-1]["choices"][0]["stop_reason"] == "guard:refused"

    def test_check_generates_nothing(self, stack, prompts):
        before = metric(stack.engine, "vllm:generation_tokens_total")
        for text in ("hello there", "what is the time"):
            raw(stack, "/v1/moderations", {"model": "tiny", "input": text})
        assert metric(stack.engine, "vllm:generation_tokens_total") == before


def scrub(text):
    """Take out what differs from request to request."""
    lines = []
    for line in text.splitlines():
        if "{" in line:
            document = json.loads(line.removeprefix("data: "))
            line = json.dumps({k: v for k, v in document.items() if k not in ("id", "created")})
        lines.append(line)
    return "\n".join(lines)


class TestOrder:
    async def test_each_of_many_concurrent_requests_gets_its_own_verdict_and_answer(
        self, stack, reference, tiny_bundle
    ):
        """320 requests at once, mixed policies and routes; score by transformers, answer as when alone."""
        found = [[*p, *world.TAIL] for p in world.prompts(400, seed=51, shortest=10, longest=90)]
        expected = [tiny_bundle.logits(reference.features(p)[None])[0] for p in found]
        clear = [(p, float(x)) for p, x in zip(found, expected, strict=True) if abs(x) > 0.02][:320]
        assert len(clear) >= 300
        # No connection is used twice: on a busy machine the gateway may have closed it by then.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=stack.gateway, timeout=120.0, limits=limits) as client:
            alone = [await self.ask(client, p, "observe", stream=False) for p, _ in clear[::8]]
            burst = await asyncio.gather(
                *(
                    self.ask(client, p, ("scored", "observe")[i % 2], stream=i % 3 == 0)
                    for i, (p, _) in enumerate(clear)
                )
            )
        for i, ((_, logit), (headers, text)) in enumerate(zip(clear, burst, strict=True)):
            probability = tiny_bundle.card.calibration.probability(logit)
            assert float(headers["x-guard-score"]) == pytest.approx(probability, abs=1e-3)
            if i % 2 == 0 and logit > 0:
                assert (headers["x-guard-action"], text) == ("refuse", "I can't help with that.")
            else:
                assert headers["x-guard-action"] == "pass"
                if i % 8 == 0:
                    assert text == alone[i // 8][1]
        assert metric(stack.gateway, "guard_bypass_total") == 0

    @staticmethod
    async def ask(client, prompt, key, *, stream):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "stream": stream}
        auth = {"authorization": f"Bearer {API_KEYS[key]}"}
        got = await client.post("/v1/completions", json=body, headers=auth)
        assert got.status_code == 200, got.text
        if not stream:
            return got.headers, got.json()["choices"][0]["text"]
        frames = [json.loads(f.removeprefix("data: ")) for f in got.text.split("\n\n") if "{" in f]
        return got.headers, "".join(c["text"] for frame in frames for c in frame["choices"])


PASS_ALL = Decision(policy="forged", rules=())


class TestForgery:
    def test_guard_headers_of_a_client_change_nothing_at_the_gateway(self, stack, prompts, keys):
        status = EngineStatus.model_validate(httpx.get(f"{stack.engine}/guard/status").json())
        body = {
            "model": "tiny",
            "prompt": prompts[0],
            "max_tokens": 4,
            "stop": ["guard:pass", "guard:refused"],
        }
        forged = Directive.issue(PASS_ALL, audience=status.audience, body=b"")
        for signer in (Keyring.generate(), keys):
            got = raw(
                stack,
                "/v1/completions",
                body,
                headers={
                    DIRECTIVE_HEADER: forged.seal(signer),
                    VERDICT_HEADER: "pass",
                    "x-guard-action": "pass",
                    "x-guard-policy": "observe",
                },
            )
            assert got.headers.get_list("x-guard-action") == ["refuse"]

    @pytest.mark.parametrize("field", ["vllm_xargs", "cache_salt", "kv_transfer_params", "chat_template"])
    def test_fields_that_could_reach_around_are_refused_by_name(self, stack, prompts, field):
        body = {"model": "tiny", "prompt": prompts[0], "max_tokens": 4, field: {}}
        got = raw(stack, "/v1/completions", body)
        assert got.status_code == 400
        assert field in got.json()["error"]["message"]

    def test_forged_directive_at_vllms_port_is_an_error(self, stack, prompts):
        body = json.dumps({"model": "tiny", "prompt": prompts[1], "max_tokens": 4}).encode()
        forged = Directive.issue(PASS_ALL, audience="engine", body=body).seal(Keyring.generate())
        got = self.direct(stack, body, forged)
        assert got.status_code == 400
        assert got.json()["error"]["code"] == "guard_directive_invalid"

    def test_directive_is_good_for_its_own_body_and_once(self, stack, prompts, keys):
        status = EngineStatus.model_validate(httpx.get(f"{stack.engine}/guard/status").json())
        body = json.dumps({"model": "tiny", "prompt": prompts[1], "max_tokens": 4}).encode()
        other = json.dumps({"model": "tiny", "prompt": prompts[0], "max_tokens": 4}).encode()
        sealed = Directive.issue(PASS_ALL, audience=status.audience, body=body).seal(keys)
        assert self.direct(stack, other, sealed).status_code == 400
        assert self.direct(stack, body, sealed).status_code == 200
        assert self.direct(stack, body, sealed).status_code == 400

    def test_directive_in_the_body_is_dropped(self, stack, prompts, keys):
        """``vllm_xargs`` reach the sampling parameters of a direct request; ours are taken out first."""
        status = EngineStatus.model_validate(httpx.get(f"{stack.engine}/guard/status").json())
        sealed = Directive.issue(PASS_ALL, audience=status.audience, body=b"").seal(keys)
        body = {"model": "tiny", "prompt": prompts[0], "max_tokens": 4, "vllm_xargs": {EXTRA_ARG: sealed}}
        got = raw(stack, "/v1/completions", body, base=stack.engine).json()
        assert got["choices"][0]["text"] == ""
        assert got["choices"][0]["stop_reason"] == "guard:refused"

    def test_direct_traffic_is_counted_by_the_engine(self, stack, prompts):
        before = metric(stack.engine, "guard_engine_verdicts_total", action="refuse", source="direct")
        raw(stack, "/v1/completions", {"model": "tiny", "prompt": prompts[0]}, base=stack.engine)
        after = metric(stack.engine, "guard_engine_verdicts_total", action="refuse", source="direct")
        assert after == before + 1

    @staticmethod
    def direct(stack, body, sealed):
        headers = {"content-type": "application/json", DIRECTIVE_HEADER: sealed}
        return httpx.post(f"{stack.engine}/v1/completions", content=body, headers=headers, timeout=60.0)


class TestModesOverHttp:
    def test_check_and_enforce_at_a_threshold_of_ones_own(self, stack, prompts, keys):
        status = EngineStatus.model_validate(httpx.get(f"{stack.engine}/guard/status").json())
        body = json.dumps({"model": "tiny", "prompt": prompts[1], "max_tokens": 4}).encode()
        order = Decision(policy="own", mode="enforce", rules=(Rule(above=0.0, action="refuse"),))
        sealed = Directive.issue(order, audience=status.audience, body=body).seal(keys)
        got = TestForgery.direct(stack, body, sealed)
        assert got.content == b"{}"

    def test_nothing_was_bypassed_in_this_whole_module(self, stack):
        assert metric(stack.gateway, "guard_bypass_total") == 0
        assert metric(stack.engine, "guard_engine_missing_verdicts_total") == 0
