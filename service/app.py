"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.exceptions import HTTPException

from guard import __version__
from guard.sealed import KeyFileError, Keyring
from service.api import (
    admin,
    azure,
    chat,
    check,
    completions,
    detector,
    health,
    litellm,
    models,
    moderations,
    responses,
)
from service.audit import PromptDigest
from service.backend import Backend
from service.engine import EngineWatch
from service.errors import ApiError, ConfigError
from service.gateway import Gateway, gateway_of, record_of
from service.judge import Judges
from service.limits import KeyLimits
from service.metrics import Metrics
from service.openapi import document
from service.policy_file import Policies
from service.policy_store import Commit, PolicyStore
from service.pool import Pool
from service.request_log import RequestLog
from service.settings import Settings
from service.tracing import Tracing


def create_app(
    settings: Settings,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    judge_transport: httpx.AsyncBaseTransport | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """Build the gateway. The transports replace the connections to the engine and to judges.

    Raises ConfigError: a file that cannot be used, or an address that would let in everybody.
    """
    if registry is None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
    metrics = Metrics(registry)
    store = PolicyStore(settings.policy_file, metrics, needs_keys=not settings.loopback)
    try:
        keys = Keyring.load(settings.key_file)
    except KeyFileError as error:
        raise ConfigError(f"The key ring cannot be used: {error}.") from error
    metrics.inflight_limit.set(settings.max_connections)
    watches = [
        EngineWatch(Backend(url, settings, keys, transport), store, metrics, settings)
        for url in settings.engines
    ]
    pool = Pool(watches, metrics, settings.max_connections)
    metrics.outstanding.set_function(lambda: pool.outstanding)
    judges = Judges(metrics, judge_transport)

    def judges_change(policies: Policies) -> Commit:
        found = judges.prepare(policies)
        return lambda: judges.use(policies, found)

    store.join(pool.prepare)
    store.join(judges_change)
    limits = KeyLimits(metrics)
    digest = None
    if settings.audit_prompt_key_file is not None:
        digest = PromptDigest.load(settings.audit_prompt_key_file)
    gateway = Gateway(settings, store, keys, pool, judges, limits, metrics, digest)
    tracing = Tracing(settings)

    app = FastAPI(
        title="neuronguard gateway",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.state.tracing = tracing
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    for module in (
        chat,
        completions,
        azure,
        responses,
        models,
        moderations,
        check,
        litellm,
        detector,
        admin,
        health,
    ):
        app.include_router(module.router)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestLog, metrics=metrics, tracing=tracing, send_timeout=settings.send_timeout)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    tasks = [asyncio.create_task(watch.run()) for watch in gateway.pool.watches]
    if gateway.settings.policy_file is not None and gateway.settings.policy_interval:
        tasks.append(asyncio.create_task(gateway.store.watch(gateway.settings.policy_interval)))
    loop = asyncio.get_running_loop()
    gateway.metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
    hangup = threading.current_thread() is threading.main_thread()
    if hangup:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.store.reload_or_log)
    try:
        yield
    finally:
        if hangup:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await gateway.judges.close()
        for watch in gateway.pool.watches:
            await watch.backend.close()
        await asyncio.to_thread(app.state.tracing.close)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 -- registered for nothing else
    record_of(request).code = error.code
    gateway_of(request).metrics.errors.labels(error.stage, "closed").inc()
    return detector.error_response(error) if request.url.path == detector.PATH else error.response()


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
