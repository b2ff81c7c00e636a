"""``GET /v1/models``: what the engine serves, under the names that clients use."""

import time
from typing import Any

from fastapi import APIRouter, Request

from guard.verdict import EngineStatus
from service.api_schemas import MODEL, MODELS
from service.gateway import admit, gateway_of
from service.openapi import WITHOUT_A_BODY, answers

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models", responses=answers(MODELS, WITHOUT_A_BODY))
async def list_models(request: Request) -> dict[str, Any]:
    """List the served model and its adapters."""
    admit(request, "chat", "checks")
    pool = gateway_of(request).pool
    pool.require()
    return {"object": "list", "data": [_card(status, name) for name, status in pool.models.items()]}


@router.get("/v1/models/{model_id:path}", responses=answers(MODEL, WITHOUT_A_BODY))
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """Describe the served model or an adapter."""
    admit(request, "chat", "checks")
    return _card(gateway_of(request).pool.serving(model_id).engine.status, model_id)


def _card(status: EngineStatus, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "neuronguard",
        "parent": None if name == status.model else status.model,
        "max_model_len": status.max_model_len,
    }
