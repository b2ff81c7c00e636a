"""``POST /beta/litellm_basic_guardrail_api``: a guardrail for LiteLLM's proxy, check only.

LiteLLM's *generic guardrail API* (docs.litellm.ai/docs/adding_provider/generic_guardrail_api). Its proxy
sends what a client asked and does as the answer says: ``BLOCKED`` ends the request, ``NONE`` lets it go on.
The contract is in beta and gains members, so that unknown ones are left alone here; what cannot be judged
(images, and answers: ``input_type: response``) is an error, at which LiteLLM blocks unless told otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from service.api_schemas import GUARDRAIL
from service.chat_body import Message
from service.checks import Messages, check_all, headers, limit_inputs, of_user
from service.errors import bad_request
from service.gateway import begin
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()
_MESSAGES: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


class GuardrailBody(BaseModel):
    """What LiteLLM sends, as far as it is looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    input_type: Literal["request", "response"]
    texts: list[str] | None = None
    """Every text of the request, each by itself."""
    structured_messages: list[dict[str, Any]] | None = None
    """The conversation, for chat requests."""
    images: list[str] | None = None
    model: str | None = None
    """The model that LiteLLM would ask. Not looked at: what judges is the model served here."""

    @property
    def conversations(self) -> list[Messages]:
        """What is judged: the conversation if it is there and all text, else each text by itself."""
        try:
            messages = _MESSAGES.validate_python(self.structured_messages or [])
        except ValidationError:
            messages = []
        if messages and messages[-1].role != "assistant":
            return [[message.model_dump(exclude_none=True) for message in messages]]
        return [of_user(text) for text in self.texts or () if text]


@router.post(
    "/beta/litellm_basic_guardrail_api",
    openapi_extra=takes(GuardrailBody),
    responses=answers(GUARDRAIL, OF_A_BODY),
)
async def judge_for_litellm(request: Request) -> Response:
    """Say whether LiteLLM's proxy may go on with a request."""
    arrival = await begin(request, "checks")
    body = arrival.validate(GuardrailBody)
    if body.input_type == "response":
        raise bad_request(
            "The guard judges prompts, not answers. Use it with 'mode: pre_call' or 'mode: during_call'.",
            param="input_type",
        )
    if body.images:
        raise bad_request("The guard judges text only, and the request holds images.", param="images")
    conversations = body.conversations
    if not conversations:
        raise bad_request("There is no text to judge.", param="texts")
    call = arrival.call(None)
    limit_inputs(call, len(conversations), "texts")
    findings = await check_all(call, conversations)
    answer: dict[str, str] = {"action": "NONE"}
    if any(finding.blocked(call) for finding in findings):
        answer = {"action": "BLOCKED", "blocked_reason": call.bound.policy.refusal.text}
    return JSONResponse(answer, headers=headers(call))
