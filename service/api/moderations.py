"""``POST /v1/moderations``: check only, in OpenAI's schema. Prefill and score, nothing is generated.

How one probability becomes thirteen categories: it does not. The probe says *whether* the answer to a text
would be unsafe (or the text is harmful; the bundle says which), never *of what kind*. So

- ``flagged`` is what the caller's policy says about the score: anything but ``pass``;
- OpenAI's thirteen categories are all there, for SDKs need them, as ``false`` and ``0.0`` with an empty list
  in ``category_applied_input_types``: nothing was looked at for them;
- a further category ``unsafe`` holds the finding, and its P(unsafe) as score if the policy exposes scores.
  Without that right its score is ``1.0`` or ``0.0``, which tells no more than ``flagged`` does.

Every input is judged as the only message of a user, by an engine request of its own.
"""

from __future__ import annotations

import asyncio
from functools import reduce
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from guard.verdict import Verdict
from service.chat_body import TextPart
from service.errors import ApiError, bad_request
from service.exchange import Forward, exchange
from service.fields import Strict, validate
from service.gateway import Call, begin, unless_gone
from service.openapi import takes
from service.strict_json import dump

router = APIRouter()

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
UNSAFE = "unsafe"
_AT_ONCE = 8

Text = Annotated[str, Field(min_length=1)]


class ModerationBody(Strict):
    """What a client may send to ``/v1/moderations``."""

    input: Text | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TextPart], Field(min_length=1)]
    """A text, several texts (a result each), or the text parts of one input (one result)."""
    model: str | None = None
    """The served model, which is also what is meant when it is left out."""

    @property
    def inputs(self) -> list[str | list[dict[str, str]]]:
        """The content of each user message to judge."""
        if isinstance(self.input, str):
            return [self.input]
        parts = [part.model_dump() for part in self.input if isinstance(part, TextPart)]
        return [parts] if parts else [text for text in self.input if isinstance(text, str)]


@router.post("/v1/moderations", openapi_extra=takes(ModerationBody))
async def create_moderation(request: Request) -> Response:
    """Say whether texts are unsafe, and generate nothing."""
    call = await begin(request)
    body = validate(ModerationBody, call.body)
    model = call.engine.status.model
    call.check_model(body.model if body.model is not None else model)
    limit = call.gateway.settings.max_moderation_inputs
    if len(body.inputs) > limit:
        raise bad_request(f"At most {limit} inputs can be checked with one request.", param="input")
    verdicts = await unless_gone(request.receive, _check_all(call, body.inputs))
    call.record.verdict = reduce(Verdict.worse_of, verdicts).decision
    answer = {
        "id": f"modr-{call.record.request_id}",
        "model": model,
        "results": [_result(verdict, call.bound.policy.expose_score) for verdict in verdicts],
    }
    return JSONResponse(answer, headers={"x-guard-action": "checked", "x-guard-policy": call.bound.name})


async def _check_all(call: Call, inputs: list[str | list[dict[str, str]]]) -> list[Verdict]:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(content: str | list[dict[str, str]]) -> Verdict:
        async with turn:
            return await _check(call, content)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(content)) for content in inputs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _check(call: Call, content: str | list[dict[str, str]]) -> Verdict:
    message = {"role": "user", "content": content}
    forward = Forward(
        path="/v1/chat/completions",
        body=dump({"model": call.engine.status.model, "messages": [message], "max_tokens": 1}),
        siblings=1,
        stream=False,
        decision=call.bound.decision.model_copy(update={"mode": "check"}),
    )
    judged = await exchange(call, forward)
    await judged.answer.close()
    if judged.verdict is None:  # there is nothing to answer with, whatever the policy lets through elsewhere
        raise ApiError(
            503,
            "The request could not be checked. Try again later.",
            code="guard_no_verdict",
            stage="verdict",
            kind="server_error",
        )
    return judged.verdict


def _result(verdict: Verdict, expose_score: bool) -> dict[str, Any]:
    flagged = verdict.unsafe
    score = verdict.probability if expose_score and verdict.probability is not None else float(flagged)
    return {
        "flagged": flagged,
        "categories": dict.fromkeys(CATEGORIES, False) | {UNSAFE: flagged},
        "category_scores": dict.fromkeys(CATEGORIES, 0.0) | {UNSAFE: score},
        "category_applied_input_types": {name: [] for name in CATEGORIES} | {UNSAFE: ["text"]},
    }
