"""LiteLLM's own proxy with this gateway as its guardrail.

Run where ``NEURONGUARD_LITELLM`` names the command ``litellm`` of an environment with ``litellm[proxy]``;
that is not among the dependencies.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.servers import free_port, process, wait_until
from tests.service.fake_answers import End, whole
from tests.service.fake_engine import HARMFUL, Seen
from tests.service.world import Live, live, serving

COMMAND = os.environ.get("NEURONGUARD_LITELLM")
pytestmark = pytest.mark.skipif(COMMAND is None, reason="NEURONGUARD_LITELLM does not name a litellm")

KEY = "sk-of-litellm"
POLICY = f"""
policies: {{default: {{refusal: {{text: Not here.}}}}}}
keys: [{{sha256: {hashlib.sha256(KEY.encode()).hexdigest()}, tenant: litellm, rights: [checks]}}]
"""
CONFIG = """
model_list:
  - model_name: some-model
    litellm_params: {{model: openai/some-model, api_base: "{model}/v1", api_key: none}}
litellm_settings: {{telemetry: false, num_retries: 0}}
guardrails:
  - guardrail_name: neuronguard
    litellm_params:
      guardrail: generic_guardrail_api
      mode: pre_call
      api_base: "{gateway}"
      api_key: os.environ/NEURONGUARD_API_KEY
      default_on: true
  - guardrail_name: away
    litellm_params: {{guardrail: generic_guardrail_api, mode: pre_call, api_base: "http://127.0.0.1:9"}}
"""


@dataclass
class Model:
    """The model behind LiteLLM: an ASGI application that answers everything."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        self.asked.append(json.loads(raw))
        text = json.dumps(whole(self.asked[-1], [End()])).encode()
        kind = b"application/json"
        if self.asked[-1].get("stream"):
            value = whole(self.asked[-1], [End()])
            choice = {"index": 0, "delta": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
            text = f"data: {json.dumps(value | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            text, kind = (text + "data: [DONE]\n\n").encode(), b"text/event-stream"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": text})


@dataclass
class Chain:
    """Client, LiteLLM, and what stands behind it."""

    client: openai.OpenAI
    model: Model
    gate: Live

    def ask(self, content: Any, *, stream: bool = False, **more: Any) -> None:
        answer = self.client.chat.completions.create(
            model="some-model", messages=[{"role": "user", "content": content}], stream=stream, **more
        )
        if stream:
            assert "".join(part.choices[0].delta.content or "" for part in answer if part.choices) == "fine"
        else:
            assert answer.choices[0].message.content


@pytest.fixture(scope="module")
def _chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder: Path = tmp_path_factory.mktemp("litellm")
    model, port = Model(), free_port()
    with live(folder, POLICY) as gate, serving(model) as model_url:
        (folder / "config.yaml").write_text(CONFIG.format(model=model_url, gateway=gate.url))
        command = [str(COMMAND), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1"]
        environment = {
            "NEURONGUARD_API_KEY": KEY,
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            "NO_PROXY": "127.0.0.1",
        }
        log = folder / "litellm.log"
        with (
            process([*command, "--port", str(port)], environment, log) as child,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key="none", max_retries=0) as client,
        ):
            wait_until(f"http://127.0.0.1:{port}/health/liveliness", child, log)
            yield Chain(client, model, gate)


@pytest.fixture
def chain(_chain: Chain) -> Chain:
    _chain.gate.engine.reset()
    _chain.model.asked.clear()
    return _chain


def checked(chain: Chain) -> list[Seen]:
    seen = chain.gate.engine.seen
    assert all(each.directive.decision.mode == "check" for each in seen)
    return seen


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_harmless_goes_on_to_the_model(chain: Chain, stream: bool) -> None:
    chain.ask("hello", stream=stream)
    assert len(chain.model.asked) == 1
    assert [seen.body["messages"] for seen in checked(chain)] == [[{"role": "user", "content": "hello"}]]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_never_reaches_the_model(chain: Chain, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="Not here"):
        chain.ask(HARMFUL, stream=stream)
    assert (len(chain.model.asked), len(checked(chain))) == (0, 1)


def test_a_conversation_is_judged_as_one(chain: Chain) -> None:
    with pytest.raises(openai.BadRequestError):
        chain.client.chat.completions.create(
            model="some-model",
            messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": HARMFUL}],
        )
    assert [message["role"] for message in checked(chain)[0].body["messages"]] == ["system", "user"]


def test_what_cannot_be_judged_does_not_go_on(chain: Chain) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.InternalServerError):
        chain.ask([{"type": "text", "text": "look"}, image])
    assert chain.model.asked == []


def test_without_a_verdict_nothing_goes_on(chain: Chain) -> None:
    chain.gate.engine.seal = lambda verdict: None
    with pytest.raises(openai.InternalServerError):
        chain.ask("hello")
    assert chain.model.asked == []


def test_a_gateway_that_is_away_blocks(chain: Chain) -> None:
    with pytest.raises(openai.InternalServerError):
        chain.ask("hello", extra_body={"guardrails": ["away"]})
    assert chain.model.asked == []
