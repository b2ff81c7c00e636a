"""The four styles of a refusal, as raw bytes and as OpenAI's and LangChain's clients see them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, HARMFUL, MODEL, SECRET
from tests.service.world import Live, live, world

TEXT = "Not here."
STYLES = ("message", "content_filter", "azure", "error")
BAD: Any = BAD_CHAT["messages"]


class Answer(BaseModel):
    word: str


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Live]]:
    """A gateway for each style."""
    folders = {style: tmp_path_factory.mktemp(style) for style in STYLES}

    def policy(style: str) -> str:
        return f"policies: {{default: {{refusal: {{style: {style}, text: '{TEXT}'}}}}}}"

    with (
        live(folders["message"], policy("message")) as message,
        live(folders["content_filter"], policy("content_filter")) as content_filter,
        live(folders["azure"], policy("azure")) as azure,
        live(folders["error"], policy("error")) as error,
    ):
        found = (message, content_filter, azure, error)
        for gate in found:
            gate.engine.leak = True  # a refusal shows nothing of the model even if the engine sends it
        yield dict(zip(STYLES, found, strict=True))


def sdk(gate: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=gate.url + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "text"])
@pytest.mark.parametrize(("style", "status"), [("azure", 400), ("error", 403)])
def test_a_refusal_that_is_an_error_has_no_frame(
    style: str, status: int, route: str, stream: bool, gates: dict[str, Live]
) -> None:
    body = BAD_CHAT if route == "chat" else {"model": MODEL, "prompt": HARMFUL}
    path = CHATS if route == "chat" else "/v1/completions"
    response = httpx.post(gates[style].url + path, json=body | {"stream": stream, "n": 2})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-guard-action"] == "refuse"
    assert "zxq" not in response.text
    error = response.json()["error"]
    assert error["message"] == TEXT
    assert {"message", "type", "param", "code"} <= set(error)


def test_azures_shape(gates: dict[str, Live]) -> None:
    error = httpx.post(gates["azure"].url + CHATS, json=BAD_CHAT).json()["error"]
    assert (error["code"], error["param"], error["status"]) == ("content_filter", "prompt", 400)
    inner = error["innererror"]
    assert inner["code"] == "ResponsibleAIPolicyViolation"
    found = {kind for kind, value in inner["content_filter_result"].items() if value["filtered"]}
    assert found == {"unsafe"}
    assert {"hate", "self_harm", "sexual", "violence"} < set(inner["content_filter_result"])


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_raises_at_errors(stream: bool, gates: dict[str, Live]) -> None:
    with sdk(gates["azure"]) as client, pytest.raises(openai.BadRequestError) as filtered:
        client.chat.completions.create(model=MODEL, messages=BAD, stream=stream)
    assert filtered.value.code == "content_filter"
    with sdk(gates["error"]) as client, pytest.raises(openai.PermissionDeniedError) as refused:
        client.chat.completions.create(model=MODEL, messages=BAD, stream=stream)
    assert (refused.value.code, refused.value.message.count(TEXT)) == ("content_policy_violation", 1)


def test_an_error_may_be_a_400(tmp_path: Path) -> None:
    with live(tmp_path, "policies: {default: {refusal: {style: error, status: 400}}}") as gate:
        assert httpx.post(gate.url + CHATS, json=BAD_CHAT).status_code == 400


def frames(text: str) -> list[dict[str, Any]]:
    parts = text.removesuffix("\n\n").split("\n\n")
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize(("style", "reason"), [("message", "stop"), ("content_filter", "content_filter")])
def test_the_raw_frames_of_a_refusal(style: str, reason: str, gates: dict[str, Live]) -> None:
    body = BAD_CHAT | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    response = httpx.post(gates[style].url + CHATS, json=body)
    found = frames(response.text)
    choices = [choice for frame in found for choice in frame["choices"]]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("refusal") or "" for choice in mine) == TEXT
        content = "".join(choice["delta"].get("content") or "" for choice in mine)
        assert content == (TEXT if style == "message" else "")
        assert [choice["finish_reason"] for choice in mine][-1] == reason
    assert found[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
    assert len({(frame["id"], frame["created"], frame["model"]) for frame in found}) == 1


def chain(gate: Live) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=gate.url + "/v1", api_key=SecretStr("none"), model=MODEL, max_retries=0, stream_usage=True
    )


def test_langchain_sees_passed_answers(gates: dict[str, Live]) -> None:
    model = chain(gates["message"])
    assert model.invoke("hello").content == SECRET
    assert "".join(str(part.content) for part in model.stream("hello")) == SECRET


def test_langchain_sees_refusals(gates: dict[str, Live]) -> None:
    refused = chain(gates["message"]).invoke(HARMFUL)
    assert (refused.content, refused.additional_kwargs["refusal"]) == (TEXT, TEXT)
    assert refused.usage_metadata is not None
    assert refused.usage_metadata["output_tokens"] == 0
    assert "".join(str(part.content) for part in chain(gates["message"]).stream(HARMFUL)) == TEXT
    filtered = chain(gates["content_filter"]).invoke(HARMFUL)
    assert filtered.content == ""
    assert filtered.response_metadata["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    ("style", "error"), [("azure", openai.BadRequestError), ("error", openai.PermissionDeniedError)]
)
def test_langchain_raises_at_errors(style: str, error: type[Exception], gates: dict[str, Live]) -> None:
    with pytest.raises(error):
        chain(gates[style]).invoke(HARMFUL)
    with pytest.raises(error):
        list(chain(gates[style]).stream(HARMFUL))


def asking(mode: str | None) -> dict[str, Any]:
    policy = {} if mode is None else {"policy": {"input": {"mode": mode}}}
    return {"moderation": {"model": "omni-moderation-latest"} | policy}


def test_the_moderation_field_reports_on_both_outcomes(gates: dict[str, Live]) -> None:
    with sdk(gates["message"]) as client:
        for messages, flagged in ((CHAT["messages"], False), (BAD, True)):
            answer = client.chat.completions.create(
                model=MODEL, messages=messages, extra_body=asking("score")
            )  # type: ignore[call-overload]
            assert answer.moderation is not None
            (result,) = answer.moderation.input.results
            assert (result.flagged, result.categories["unsafe"]) == (flagged, flagged)
            assert result.category_scores["unsafe"] == float(flagged)
            assert answer.moderation.output.type == "error"
            assert answer.choices[0].message.content == (TEXT if flagged else SECRET)


def test_the_moderation_field_has_a_chunk_of_its_own(gates: dict[str, Live]) -> None:
    for messages, flagged in ((CHAT["messages"], False), (BAD, True)):
        body = CHAT | {"messages": messages, "stream": True} | asking(None)
        found = frames(httpx.post(gates["message"].url + CHATS, json=body).text)
        (chunk,) = [frame for frame in found if "moderation" in frame]
        assert chunk["choices"] == []
        assert {name: chunk[name] for name in ("id", "object", "model")} == {
            name: found[0][name] for name in ("id", "object", "model")
        }
        assert chunk["moderation"]["input"]["results"][0]["flagged"] is flagged


@pytest.mark.parametrize(
    "policy", ["mode: observe", "rules: [{above: 0.5, action: tag}]", "mode: enforce"], ids=str
)
async def test_the_moderation_field_narrows_and_never_widens(policy: str, tmp_path: Path) -> None:
    async with world(tmp_path, f"policies: {{default: {{{policy}}}}}") as w:
        usual = (await w.client.post(CHATS, json=BAD_CHAT)).headers["x-guard-action"]
        assert usual == {"mode: observe": "pass", "mode: enforce": "refuse"}.get(policy, "tag")
        for mode in ("score", None):
            answer = await w.client.post(CHATS, json=BAD_CHAT | asking(mode))
            assert answer.headers["x-guard-action"] == usual
        blocked = await w.client.post(CHATS, json=BAD_CHAT | asking("block"))
        assert blocked.headers["x-guard-action"] == "refuse"
        assert SECRET not in blocked.text
        passed = await w.client.post(CHATS, json=CHAT | asking("block"))
        assert (passed.headers["x-guard-action"], SECRET in passed.text) == ("pass", True)
        assert "moderation" not in w.engine.seen[-1].body


async def test_what_the_moderation_field_cannot_do_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        wish = {"moderation": {"model": "m", "policy": {"output": {"mode": "block"}}}}
        answer = await w.client.post(CHATS, json=CHAT | wish)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "moderation.policy.output")
        assert w.engine.seen == []
