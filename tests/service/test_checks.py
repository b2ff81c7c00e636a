"""Check-only routes: the contracts of others are kept, and nothing is generated."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.service.fake_engine import HARMFUL, MODEL, SECRET
from tests.service.world import World, world

CONTRACTS = Path(__file__).parent.parent / "data" / "contracts"
LITELLM = "/beta/litellm_basic_guardrail_api"
DETECTOR = "/api/v1/text/contents"
CHECK = "/v1/guard/check"
AS_DETECTOR = {"detector-id": "neuronguard"}


def conforms(value: Any, contract: str, part: str) -> Any:
    schema = json.loads((CONTRACTS / contract).read_text())["$defs"][part]
    jsonschema.validate(value, schema)
    return value


def from_litellm(*texts: str, messages: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """A request as LiteLLM 1.106 builds it, which sends members that are not set as null."""
    body = {
        "input_type": "request",
        "litellm_call_id": "c-1",
        "litellm_trace_id": None,
        "structured_messages": messages,
        "images": None,
        "tools": None,
        "texts": list(texts),
        "request_data": {"user_api_key_alias": "team"},
        "request_headers": {"host": "litellm", "authorization": "[present]"},
        "litellm_version": "1.106.2",
        "additional_provider_specific_params": {"a": [1]},
        "tool_calls": None,
        "model": "gpt-4o",
    } | more
    conforms(body, "litellm_generic_guardrail.json", "request")
    return body


async def litellm(w: World, body: dict[str, Any]) -> dict[str, Any]:
    response = await w.client.post(LITELLM, json=body)
    assert response.status_code == 200
    return dict(conforms(response.json(), "litellm_generic_guardrail.json", "response"))


async def test_litellm_is_told_whether_to_go_on(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {refusal: {text: No.}}}") as w:
        assert await litellm(w, from_litellm("hello")) == {"action": "NONE"}
        for texts in ((HARMFUL,), ("hello", HARMFUL)):
            assert await litellm(w, from_litellm(*texts)) == {"action": "BLOCKED", "blocked_reason": "No."}


async def test_litellms_conversation_is_judged_as_one(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": HARMFUL}]},
    ]
    async with world(tmp_path) as w:
        body = from_litellm("be brief", HARMFUL, messages=messages)
        assert (await litellm(w, body))["action"] == "BLOCKED"
        assert [seen.body["messages"] for seen in w.engine.seen] == [messages]


async def test_what_of_a_conversation_is_not_text_is_judged_text_by_text(tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "prefill"}]
    async with world(tmp_path) as w:
        assert (await litellm(w, from_litellm("hello", "prefill", messages=odd)))["action"] == "NONE"
        assert len(w.engine.seen) == 2


@pytest.mark.parametrize(
    "body",
    [
        from_litellm("an answer", input_type="response"),
        from_litellm("look", images=["data:image/png;base64,AA=="]),
        from_litellm(),
        {"texts": ["no input type"]},
    ],
    ids=["an answer", "an image", "nothing", "malformed"],
)
async def test_what_cannot_be_judged_does_not_pass_litellm(body: dict[str, Any], tmp_path: Path) -> None:
    """LiteLLM blocks at any error, unless its own configuration says otherwise."""
    async with world(tmp_path) as w:
        response = await w.client.post(LITELLM, json=body)
        assert response.status_code == 400
        assert "action" not in response.json()
        assert w.engine.seen == []


@pytest.mark.parametrize(
    ("policy", "action"),
    [("mode: observe", "NONE"), ("rules: [{above: 0.5, action: tag}]", "NONE"), ("mode: enforce", "BLOCKED")],
)
async def test_litellm_is_told_to_block_only_what_would_be_refused(
    policy: str, action: str, tmp_path: Path
) -> None:
    async with world(tmp_path, f"policies: {{default: {{{policy}}}}}") as w:
        assert (await litellm(w, from_litellm(HARMFUL)))["action"] == action


async def test_the_detector_contract(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        body = {"contents": ["hello", HARMFUL, ""], "detector_params": {"threshold": 0.1}}
        conforms(body, "fms_text_contents.json", "request")
        response = await w.client.post(DETECTOR, json=body, headers=AS_DETECTOR)
        found = conforms(response.json(), "fms_text_contents.json", "response")
        assert found == [
            [],
            [
                {
                    "start": 0,
                    "end": len(HARMFUL),
                    "text": HARMFUL,
                    "detection": "unsafe",
                    "detection_type": "unsafe_output",
                    "detector_id": "neuronguard",
                    "score": 0.97,
                }
            ],
            [],
        ]


async def test_a_detector_finds_nothing_in_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post(DETECTOR, json={"contents": ["", ""]}, headers=AS_DETECTOR)
        assert (response.status_code, response.json()) == (200, [[], []])


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, {"contents": ["x"]}, 404),
        ({"detector-id": "other"}, {"contents": ["x"]}, 404),
        (AS_DETECTOR, {"contents": "x"}, 422),
        (AS_DETECTOR, {}, 422),
        (AS_DETECTOR, {"contents": ["x"] * 33}, 422),
    ],
)
async def test_a_detectors_errors_have_its_shape(
    headers: dict[str, str], body: dict[str, Any], status: int, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post(DETECTOR, json=body, headers=headers)
        assert response.status_code == status
        conforms(response.json(), "fms_text_contents.json", "error")
        w.engine.seal = lambda verdict: None
        closed = await w.client.post(DETECTOR, json={"contents": ["x"]}, headers=AS_DETECTOR)
        assert closed.status_code == 503
        conforms(closed.json(), "fms_text_contents.json", "error")


async def test_the_full_verdict(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        body = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": HARMFUL}]}
        answer = (await w.client.post(CHECK, json=body)).json()
        assert (answer["object"], answer["model"], answer["policy"]) == ("guard.check", MODEL, "default")
        assert answer["results"] == [
            {
                "flagged": True,
                "decision": "refuse",
                "escalated": False,
                "verdict": {
                    "probability": 0.97,
                    "logit": 0.0,
                    "threshold": 0.5,
                    "unsafe": True,
                    "bundle": "b" * 64,
                    "read": "prompt_last",
                    "unscored_shape": False,
                    "prompt_tokens": 7,
                },
            }
        ]
        two = (await w.client.post(CHECK, json={"input": ["hello", HARMFUL], "model": MODEL})).json()
        assert [result["flagged"] for result in two["results"]] == [False, True]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": "x", "messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"input": "x", "vllm_xargs": {}},
        {"input": ["x"] * 33},
    ],
)
async def test_a_check_that_makes_no_sense(body: dict[str, Any], tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert (await w.client.post(CHECK, json=body)).status_code == 400
        assert w.engine.seen == []


REQUESTS: dict[str, dict[str, Any]] = {
    CHECK: {"input": HARMFUL},
    LITELLM: from_litellm(HARMFUL),
    DETECTOR: {"contents": [HARMFUL]},
    "/v1/moderations": {"input": HARMFUL},
}


@pytest.mark.parametrize("path", REQUESTS)
async def test_checks_generate_nothing_and_show_nothing_of_the_model(path: str, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.leak = True
        response = await w.client.post(path, json=REQUESTS[path], headers=AS_DETECTOR)
        assert response.status_code == 200
        assert response.headers["x-guard-action"] == "checked"
        assert SECRET not in response.text
        (seen,) = w.engine.seen
        assert (seen.directive.decision.mode, seen.body["max_tokens"]) == ("check", 1)


@pytest.mark.parametrize("path", REQUESTS)
async def test_without_a_verdict_no_check_says_that_all_is_well(path: str, tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {on_missing_verdict: open}}") as w:
        w.engine.seal = lambda verdict: None
        response = await w.client.post(path, json=REQUESTS[path], headers=AS_DETECTOR)
        assert response.status_code == 503


@pytest.mark.parametrize("path", [CHECK, LITELLM, DETECTOR])
async def test_verdicts_are_for_keys_with_the_right(path: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    for right, status in (("chat", 403), ("checks", 200)):
        text = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {digest}, tenant: t, rights: [{right}]}}]"
        async with world(tmp_path, text) as w:
            headers = AS_DETECTOR | {"x-api-key": "k"}
            assert (await w.client.post(path, json=REQUESTS[path], headers=headers)).status_code == status


@pytest.mark.parametrize("path", ["/v1/responses"])
async def test_an_api_that_cannot_be_guarded_is_refused_clearly(path: str, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post(path, json={"model": MODEL, "input": "hello"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "unsupported_api")
        assert "/v1/chat/completions" in error["message"]
        assert w.engine.seen == []
