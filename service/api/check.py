"""``POST /v1/guard/check``: check only, with the whole verdict, for keys with the right ``checks``."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from service.api_schemas import CHECK
from service.chat_body import Message
from service.checks import Finding, Messages, check_all, headers, limit_inputs, of_user
from service.fields import Strict
from service.gateway import begin
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()

Text = Annotated[str, Field(min_length=1)]


class CheckBody(Strict):
    """What a client may send to ``/v1/guard/check``: one conversation, or texts of users."""

    model: str | None = None
    """The served model, which is also what is meant when it is left out."""
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    input: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """A text, or several (a result each), each judged as the only message of a user."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.messages is None) == (self.input is None):
            raise ValueError("send either 'messages' or 'input'")
        if self.messages is not None and self.messages[-1].role == "assistant":
            raise ValueError("the last of 'messages' must not have the role 'assistant'")
        return self

    @property
    def conversations(self) -> list[Messages]:
        """What is judged."""
        if self.messages is not None:
            return [[message.model_dump(exclude_none=True) for message in self.messages]]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [of_user(text) for text in texts]


@router.post(
    "/v1/guard/check",
    openapi_extra=takes(CheckBody),
    responses=answers(CHECK, OF_A_BODY),
)
async def check(request: Request) -> Response:
    """Judge a conversation or texts, and generate nothing."""
    arrival = await begin(request, "checks")
    body = arrival.validate(CheckBody)
    call = arrival.call(body.model)
    limit_inputs(call, len(body.conversations), "input")
    findings = await check_all(call, body.conversations)
    answer = {
        "id": f"check-{call.record.request_id}",
        "object": "guard.check",
        "model": call.model,
        "policy": call.bound.name,
        "mode": call.bound.decision.mode,
        "results": [_result(finding) for finding in findings],
    }
    return JSONResponse(answer, headers=headers(call))


_SHOWN = {"probability", "logit", "threshold", "unsafe", "bundle", "read", "unscored_shape", "prompt_tokens"}


def _result(finding: Finding) -> dict[str, Any]:
    return {
        "flagged": finding.flagged,
        "decision": finding.decision,
        "escalated": finding.verdict.decision == "escalate",
        "verdict": finding.verdict.model_dump(include=_SHOWN),
    }
