"""``POST /v1/completions``."""

from fastapi import APIRouter, Request, Response

from service.completion_body import CompletionBody
from service.gateway import begin
from service.generate import generate
from service.openapi import takes

router = APIRouter()


@router.post("/v1/completions", openapi_extra=takes(CompletionBody))
async def create_completion(request: Request) -> Response:
    """Continue a text, or refuse to."""
    arrival = await begin(request, "chat")
    return await generate(arrival, arrival.validate(CompletionBody), "text")
