"""``POST /openai/deployments/{deployment}/…``: the generating routes under the paths of Azure OpenAI.

For clients of Azure, which put the model into the path. As there, the path decides, whatever the body says;
``api-version`` is not looked at. Everything else is as under ``/v1``.
"""

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from service.api_schemas import COMPLETION
from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.gateway import Arrival, begin
from service.generate import generate
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()

PATH = "/openai/deployments/{deployment:path}"
_ANSWERS = answers(COMPLETION, OF_A_BODY, stream=True)


@router.post(f"{PATH}/chat/completions", openapi_extra=takes(ChatBody), responses=_ANSWERS)
async def create_chat_completion_of_deployment(request: Request, deployment: str) -> Response:
    """Answer a conversation, or refuse to."""
    arrival = _to(deployment, await begin(request, "chat"))
    return await generate(arrival, arrival.validate(ChatBody), "chat")


@router.post(f"{PATH}/completions", openapi_extra=takes(CompletionBody), responses=_ANSWERS)
async def create_completion_of_deployment(request: Request, deployment: str) -> Response:
    """Continue a text, or refuse to."""
    arrival = _to(deployment, await begin(request, "chat"))
    return await generate(arrival, arrival.validate(CompletionBody), "text")


def _to(deployment: str, arrival: Arrival) -> Arrival:
    return replace(arrival, body=arrival.body | {"model": deployment})
