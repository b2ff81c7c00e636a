"""``POST /v1/moderations``: check only, in OpenAI's schema. Prefill and score, nothing is generated.

What the results mean stands in ``service.moderation``. Every input is judged as the only message of a user,
by an engine request of its own.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from service.api_schemas import MODERATIONS
from service.chat_body import TextPart
from service.checks import check_all, headers, limit_inputs, of_user
from service.fields import Strict
from service.gateway import begin
from service.moderation import result
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()

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


@router.post(
    "/v1/moderations",
    openapi_extra=takes(ModerationBody),
    responses=answers(MODERATIONS, OF_A_BODY),
)
async def create_moderation(request: Request) -> Response:
    """Say whether texts are unsafe, and generate nothing."""
    arrival = await begin(request, "chat", "checks")
    body = arrival.validate(ModerationBody)
    call = arrival.call(body.model)
    limit_inputs(call, len(body.inputs), "input")
    findings = await check_all(call, [of_user(content) for content in body.inputs])
    answer = {
        "id": f"modr-{call.record.request_id}",
        "model": call.model,
        "results": [result(finding.flagged, call.shown(finding.verdict)) for finding in findings],
    }
    return JSONResponse(answer, headers=headers(call))
