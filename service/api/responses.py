"""``/v1/responses``: refused clearly.

One request to it can run the model several times over with tools and stored conversations between, so that
what the model sees is not what the client sent, and one verdict does not speak for it.
"""

from fastapi import APIRouter, Request, Response

from service.errors import ApiError
from service.gateway import admit
from service.openapi import WITHOUT_A_BODY, answers

router = APIRouter()


@router.post("/v1/responses", responses=answers(None, WITHOUT_A_BODY), status_code=404)
async def create_response(request: Request) -> Response:
    """Say that this API is not served."""
    admit(request, "chat")
    raise ApiError(
        404,
        "The Responses API is not served here, because what it shows to the model cannot be guarded. "
        "Use POST /v1/chat/completions.",
        code="unsupported_api",
        stage="request",
    )
