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

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from service.chat_body import TextPart
from service.checks import Finding, check_all, of_user
from service.errors import bad_request
from service.fields import Strict
from service.gateway import begin
from service.openapi import takes

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
    arrival = await begin(request, "chat", "checks")
    body = arrival.validate(ModerationBody)
    call = arrival.call(body.model)
    limit = call.gateway.settings.max_moderation_inputs
    if len(body.inputs) > limit:
        raise bad_request(f"At most {limit} inputs can be checked with one request.", param="input")
    findings = await check_all(call, [of_user(content) for content in body.inputs])
    answer = {
        "id": f"modr-{call.record.request_id}",
        "model": call.model,
        "results": [_result(finding, call.bound.policy.expose_score) for finding in findings],
    }
    return JSONResponse(answer, headers={"x-guard-action": "checked", "x-guard-policy": call.bound.name})


def _result(finding: Finding, expose_score: bool) -> dict[str, Any]:
    flagged, probability = finding.flagged, finding.verdict.probability
    score = probability if expose_score and probability is not None else float(flagged)
    return {
        "flagged": flagged,
        "categories": dict.fromkeys(CATEGORIES, False) | {UNSAFE: flagged},
        "category_scores": dict.fromkeys(CATEGORIES, 0.0) | {UNSAFE: score},
        "category_applied_input_types": {name: [] for name in CATEGORIES} | {UNSAFE: ["text"]},
    }
