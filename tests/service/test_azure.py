"""Azure OpenAI's paths: the same guard for clients that put the model into the path."""

import json
import logging
from pathlib import Path

import openai
import pytest

from tests.service.answers import TEXT
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL, SECRET
from tests.service.world import live, world

BASE = f"/openai/deployments/{MODEL}"
AZURE = "policies: {default: {refusal: {style: azure, text: Not here.}}}"


def test_azures_client_is_answered_and_refused(tmp_path: Path) -> None:
    with (
        live(tmp_path, AZURE) as gate,
        openai.AzureOpenAI(
            azure_endpoint=gate.url, api_key="none", api_version="2024-10-21", max_retries=0
        ) as client,
    ):
        answer = client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == SECRET
        parts = client.chat.completions.create(**CHAT, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == SECRET
        assert client.completions.create(**TEXT).choices[0].text == SECRET
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(**BAD_CHAT, stream=stream)
            assert refused.value.code == "content_filter"
        assert [seen.path for seen in gate.engine.seen] == [
            "/v1/chat/completions",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/chat/completions",
        ]


@pytest.mark.parametrize("named", [{}, {"model": "gpt-4o"}], ids=["nothing", "another model"])
async def test_the_path_decides_about_the_model(named: dict[str, str], tmp_path: Path) -> None:
    body = {"messages": CHAT["messages"]} | named
    async with world(tmp_path) as w:
        assert (await w.client.post(f"{BASE}/chat/completions", json=body)).status_code == 200
        assert w.engine.seen[0].body["model"] == MODEL
        missing = await w.client.post("/openai/deployments/gpt-4o/chat/completions", json=CHAT)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_policy_is_that_of_the_model_in_the_path(tmp_path: Path) -> None:
    policy = f"""
policies: {{default: {{mode: observe}}, strict: {{}}}}
assign: [{{model: {MODEL}, policy: strict}}]
"""
    async with world(tmp_path, policy) as w:
        answer = await w.client.post(f"{BASE}/chat/completions", json=BAD_CHAT | {"model": "other"})
        assert (answer.headers["x-guard-policy"], answer.headers["x-guard-action"]) == ("strict", "refuse")
        assert SECRET not in answer.text


async def test_it_is_audited_under_its_own_route(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="neuronguard.audit")
    async with world(tmp_path) as w:
        await w.client.post(f"{BASE}/chat/completions", json=CHAT)
    lines = [json.loads(record.message) for record in caplog.records if record.name == "neuronguard.audit"]
    assert {line["route"] for line in lines} == {"/openai/deployments/{id}/chat/completions"}


async def test_what_is_not_accepted_elsewhere_is_not_accepted_here(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for body in (CHAT | {"cache_salt": "s"}, {"model": MODEL}, []):
            answer = await w.client.post(f"{BASE}/chat/completions", content=json.dumps(body))
            assert answer.status_code == 415
            answer = await w.client.post(f"{BASE}/chat/completions", json=body)
            assert answer.status_code == 400
        assert w.engine.seen == []
