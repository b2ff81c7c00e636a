"""The outermost layer: request ids, the audit line, and the last resort for errors nobody expected."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.audit import AuditRecord
from service.errors import ApiError, ClientGoneError, unavailable
from service.metrics import Metrics
from service.tracing import ERROR, ROUTE, STATUS, Passing, Span, Tracing

logger = logging.getLogger("neuronguard.gateway")

REQUEST_ID_HEADER = "x-request-id"
UNAUDITED = ("/healthz", "/readyz", "/metrics", "/openapi.json")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_AZURE = re.compile(r"/openai/deployments/.+?/((?:chat/)?completions)")
_ROUTES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/moderations", "/v1/models"),
    *("/v1/responses", "/v1/guard/check", "/beta/litellm_basic_guardrail_api", "/api/v1/text/contents"),
    "/admin/policies/reload",
)


class RequestLog:
    """ASGI middleware.

    Handlers find the record of their request in ``request.state.record``, and enter what they hold until the
    end of their answer into ``request.state.held``.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing, send_timeout: float) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing
        self.send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, audited = Headers(scope=scope), scope["path"] not in UNAUDITED
        record = AuditRecord(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request_id=_request_id(headers.get(REQUEST_ID_HEADER)),
            route=_route(scope["path"]),
        )
        span: Span = Passing(None)
        if audited:
            span = self.tracing.request(f"{scope['method']} {record.route}", headers)
        scope.setdefault("state", {})["span"] = span
        scope.setdefault("state", {})["record"] = record
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                if audited:
                    self._audit(record, message["status"])
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            try:
                async with asyncio.timeout(self.send_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientGoneError from None  # it is there, but does not read

        held = scope["state"]["held"] = ExitStack()
        with self.metrics.inflight.track_inprogress() if audited else nullcontext(), held:
            try:
                await self.app(scope, receive, send_with_id)
            except ClientGoneError:
                record.outcome = "client_gone"
                record.status = record.status or 499
            except asyncio.CancelledError:  # told to stop, and the time to finish is over
                record.outcome = "interrupted"
                raise
            except _UnauditedError:
                self.metrics.errors.labels("audit", "closed").inc()
                failure = unavailable(
                    "The request cannot be answered now.", code="audit_failed", stage="audit"
                )
                record.code, record.status = failure.code, failure.status
                await failure.response()(scope, receive, send)
            except Exception as error:
                # The message may quote a prompt, so only the kind of error and its place are logged.
                logger.error("request %s failed: %s", record.request_id, _place(error))
                self.metrics.errors.labels("internal", "closed").inc()
                if record.status is not None:
                    record.outcome = "interrupted"
                    raise RuntimeError("an answer broke off, see the line above") from None
                failure = ApiError(
                    500,
                    "The gateway failed to handle this request.",
                    code="internal_error",
                    stage="internal",
                    kind="server_error",
                )
                record.code = failure.code
                await failure.response()(scope, receive, send_with_id)
            finally:
                elapsed = time.perf_counter() - started
                record.total_seconds = round(elapsed, 6)
                if record.upstream_id is not None:
                    self.metrics.request_seconds.observe(elapsed)
                if audited:
                    self._end(record)
                    span.end({ROUTE: record.route, STATUS: record.status, ERROR: record.code})

    def _audit(self, record: AuditRecord, status: int) -> None:
        """Write the first line, or do not answer."""
        if isinstance(record.status, int):
            return
        record.status = status
        try:
            record.write("answer")
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            record.status = None
            logger.error("the audit log cannot be written: %s", error)
            raise _UnauditedError from None

    def _end(self, record: AuditRecord) -> None:
        try:
            record.write("end")
        except (OSError, ValueError) as error:
            if record.event == "answer":
                self.metrics.errors.labels("audit", "open").inc()
            logger.error("the audit log cannot be written: %s", error)


class _UnauditedError(Exception):
    """The line about an answer could not be written before it."""


def _request_id(sent: str | None) -> str:
    return sent if sent is not None and _SANE_ID.fullmatch(sent) else uuid.uuid4().hex


def _route(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    azure = _AZURE.fullmatch(path)
    if azure is not None:
        return f"/openai/deployments/{{id}}/{azure[1]}"
    return path if path in _ROUTES else "unknown"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(
        [type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))]
    )
