"""``GET /v1/models``: what the engine serves, under the names that clients use."""

import time
from typing import Any

from fastapi import APIRouter, Request

from guard.verdict import EngineStatus
from service.errors import unknown_model
from service.gateway import admit

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the served model."""
    _, engine, _ = admit(request)
    return {"object": "list", "data": [_card(engine.status)]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """Describe the served model."""
    _, engine, _ = admit(request)
    if model_id != engine.status.model:
        raise unknown_model(model_id)
    return _card(engine.status)


def _card(status: EngineStatus) -> dict[str, Any]:
    return {
        "id": status.model,
        "object": "model",
        "created": _STARTED,
        "owned_by": "neuronguard",
        "max_model_len": status.max_model_len,
    }
