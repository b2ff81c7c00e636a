"""``POST /v1/chat/completions``."""

from fastapi import APIRouter, Request, Response

from service.api_schemas import COMPLETION
from service.chat_body import ChatBody
from service.gateway import begin
from service.generate import generate
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    openapi_extra=takes(ChatBody),
    responses=answers(COMPLETION, OF_A_BODY, stream=True),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, or refuse to."""
    arrival = await begin(request, "chat")
    return await generate(arrival, arrival.validate(ChatBody), "chat")
