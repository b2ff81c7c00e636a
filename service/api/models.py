"""``GET /v1/models``: what the engine serves, under the names that clients use."""

import time
from typing import Any

from fastapi import APIRouter, Request

from guard.verdict import EngineStatus
from service.errors import unknown_model
from service.gateway import admit, gateway_of

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the served model and its adapters."""
    admit(request, "chat", "checks")
    engine = gateway_of(request).engine.require()
    return {"object": "list", "data": [_card(engine.status, name) for name in engine.status.names]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """Describe the served model or an adapter."""
    admit(request, "chat", "checks")
    engine = gateway_of(request).engine.require()
    if model_id not in engine.status.names:
        raise unknown_model(model_id)
    return _card(engine.status, model_id)


def _card(status: EngineStatus, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "neuronguard",
        "parent": None if name == status.model else status.model,
        "max_model_len": status.max_model_len,
    }
