from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Moderation, ModerationCreateResponse
from openai.types.moderation import Categories

from service.moderation import CATEGORIES
from tests.service.fake_engine import HARMFUL, MODEL, SECRET
from tests.service.world import world

ROUTE = "/v1/moderations"


def results(response: httpx.Response) -> list[Moderation]:
    assert response.status_code == 200, response.text
    return ModerationCreateResponse.model_validate(response.json()).results


def test_the_categories_are_openais() -> None:
    assert len(CATEGORIES) == 13
    names = {field.alias or name for name, field in Categories.model_fields.items()}
    assert names == set(CATEGORIES)


async def test_a_check_generates_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.leak = True
        response = await w.client.post(ROUTE, json={"input": HARMFUL})
        assert SECRET not in response.text
        assert response.headers["x-guard-action"] == "checked"
        (seen,) = w.engine.seen
        assert seen.directive.decision.mode == "check"
        assert seen.body["messages"] == [{"role": "user", "content": HARMFUL}]
        assert seen.body["max_tokens"] == 1


async def test_no_category_is_claimed_but_unsafe(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        response = await w.client.post(ROUTE, json={"input": ["hello", HARMFUL], "model": MODEL})
        assert [result.flagged for result in results(response)] == [False, True]
        for raw, flagged in zip(response.json()["results"], (False, True), strict=True):
            assert all(raw["categories"][name] is False for name in CATEGORIES)
            assert all(raw["category_scores"][name] == 0.0 for name in CATEGORIES)
            assert all(raw["category_applied_input_types"][name] == [] for name in CATEGORIES)
            assert raw["categories"]["unsafe"] is flagged
            assert raw["category_scores"]["unsafe"] == float(flagged)
            assert raw["category_applied_input_types"]["unsafe"] == ["text"]
        labels = {
            "policy": "default",
            "model": MODEL,
            "action": "checked",
            "mode": "check",
            "stream": "false",
        }
        assert w.metric("guard_requests_total", verdict="refuse", **labels) == 1
        assert w.metric("guard_requests_total", verdict="pass", **labels) == 1


async def test_the_score_is_shown_only_if_the_policy_exposes_it(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {expose_score: true}}") as w:
        raw = (await w.client.post(ROUTE, json={"input": [HARMFUL, "hello"]})).json()["results"]
        assert [result["category_scores"]["unsafe"] for result in raw] == [0.97, 0.01]


async def test_results_keep_the_order_of_many_inputs(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        inputs = [HARMFUL if index % 3 == 0 else f"text {index}" for index in range(20)]
        found = results(await w.client.post(ROUTE, json={"input": inputs}))
        assert [result.flagged for result in found] == [text == HARMFUL for text in inputs]


async def test_text_parts_are_one_input(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "how do I"}, {"type": "text", "text": "build a bomb"}]
    async with world(tmp_path) as w:
        assert [result.flagged for result in results(await w.client.post(ROUTE, json={"input": parts}))] == [
            True
        ]
        assert w.engine.seen[0].body["messages"][0]["content"] == parts


async def test_observe_still_says_what_the_rules_say(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {mode: observe}}") as w:
        assert results(await w.client.post(ROUTE, json={"input": HARMFUL}))[0].flagged


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"input": ""}, 400),
        ({"input": []}, 400),
        ({"input": ["a", ""]}, 400),
        ({"input": [1]}, 400),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, 400),
        ({"input": ["x"] * 5}, 400),
        ({"input": "x", "extra": 1}, 400),
        ({"input": "x", "model": "omni-moderation-latest"}, 404),
    ],
)
async def test_other_bodies_are_refused(body: dict[str, Any], status: int, tmp_path: Path) -> None:
    async with world(tmp_path, max_moderation_inputs=4) as w:
        response = await w.client.post(ROUTE, json=body)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert w.engine.seen == []


@pytest.mark.parametrize("policy", ["closed", "open"])
async def test_a_check_without_a_verdict_is_a_503(policy: str, tmp_path: Path) -> None:
    async with world(tmp_path, f"policies: {{default: {{on_missing_verdict: {policy}}}}}") as w:
        w.engine.seal = lambda verdict: None
        response = await w.client.post(ROUTE, json={"input": ["a", "b", "c"]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "guard_no_verdict")


async def test_one_error_of_the_engine_is_the_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        message = "This model's maximum context length is 512 tokens."
        w.engine.error = (400, {"error": {"message": message, "code": 400}})
        response = await w.client.post(ROUTE, json={"input": ["a", "b"]})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert response.json()["error"]["param"] == "input"
