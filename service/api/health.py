"""Routes for operators: alive, ready, metrics. Without API key, without audit."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api_schemas import HEALTH
from service.errors import RETRY_AFTER
from service.gateway import gateway_of
from service.openapi import answers

router = APIRouter()
metrics_router = APIRouter()
"""Left out where the metrics have a port of their own."""

_READY = answers(HEALTH)
_READY[503] = _READY[200] | {"description": "Requests would not be answered."}


@router.get("/healthz", responses=answers(HEALTH))
async def healthz() -> dict[str, str]:
    """The process runs."""
    return {"status": "ok"}


@router.get("/readyz", responses=_READY)
async def readyz(request: Request) -> Response:
    """An engine is up, its guard passed the self-test, and every policy makes sense with its bundle.

    With several engines, ``detail`` says what is wrong with those that are not ready.
    """
    gateway = gateway_of(request)
    detail = {"detail": gateway.pool.why} if gateway.pool.why else {}
    if gateway.draining.is_set():
        return JSONResponse({"status": "not ready", "detail": "the gateway is stopping"}, 503)
    if not gateway.pool.ready:
        return JSONResponse({"status": "not ready"} | detail, 503, headers=RETRY_AFTER)
    return JSONResponse({"status": "ready"} | detail)


@metrics_router.get(
    "/metrics",
    response_class=PlainTextResponse,
)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(generate_latest(gateway_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
