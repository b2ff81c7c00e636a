"""``POST /v1/completions``."""

from fastapi import APIRouter, Request, Response

from service.api_schemas import COMPLETION
from service.completion_body import CompletionBody
from service.gateway import begin
from service.generate import generate
from service.openapi import OF_A_BODY, answers, takes

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=takes(CompletionBody),
    responses=answers(COMPLETION, OF_A_BODY, stream=True),
)
async def create_completion(request: Request) -> Response:
    """Continue a text, or refuse to."""
    arrival = await begin(request, "chat")
    return await generate(arrival, arrival.validate(CompletionBody), "text")
