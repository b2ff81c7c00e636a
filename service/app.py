"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.exceptions import HTTPException

from guard import __version__
from guard.sealed import KeyFileError, Keyring
from service.api import chat, completions, health, models, moderations
from service.backend import Backend
from service.engine import EngineWatch
from service.errors import ApiError, ConfigError
from service.gateway import Gateway, gateway_of, record_of
from service.metrics import Metrics
from service.openapi import document
from service.policy import load_policies
from service.request_log import RequestLog
from service.settings import Settings


def create_app(
    settings: Settings,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """Build the gateway. ``transport`` replaces the connection to the engine.

    Raises ConfigError: a file that cannot be used, or an address that would let in everybody.
    """
    policies = load_policies(settings.policy_file)
    if not policies.keys and not settings.loopback:
        raise ConfigError(
            f"Without keys in the policy file the gateway serves loopback only, and '{settings.host}' is not "
            "a loopback address; add keys or set NEURONGUARD_HOST=127.0.0.1."
        )
    try:
        keys = Keyring.load(settings.key_file)
    except KeyFileError as error:
        raise ConfigError(f"The key ring cannot be used: {error}.") from error
    if registry is None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
    metrics = Metrics(registry)
    metrics.inflight_limit.set(settings.max_connections)
    backend = Backend(settings, keys, transport)
    engine = EngineWatch(backend, policies, metrics, settings.status_interval)
    gateway = Gateway(settings, policies, keys, backend, engine, metrics)

    app = FastAPI(
        title="neuronguard gateway",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    for module in (chat, completions, models, moderations, health):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    watch = asyncio.create_task(gateway.engine.run())
    try:
        yield
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await gateway.backend.close()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 -- registered for nothing else
    record_of(request).code = error.code
    gateway_of(request).metrics.errors.labels(error.stage, "closed").inc()
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the router, which are about paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 -- registered for nothing else
    if error.status_code == 405:
        message, code = f"{request.method} is not allowed here.", "method_not_allowed"
    elif error.status_code == 404:
        message, code = "There is no such route. GET /openapi.json lists them.", "route_not_found"
    else:
        message, code = "The request cannot be handled.", "bad_request"
    return await _api_error(
        request, ApiError(error.status_code, message, code=code, stage="request", headers=error.headers)
    )
