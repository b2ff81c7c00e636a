"""The parts of one running gateway, and the start of every request that reaches the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from guard.sealed import Keyring
from guard.verdict import Verdict
from service.affinity import conversation
from service.audit import AuditRecord, PromptDigest
from service.auth import authenticate, require
from service.errors import ApiError, ClientGoneError, bad_request
from service.fields import Body, validate
from service.judge import Judges
from service.limits import KeyLimits
from service.metrics import Metrics
from service.policy import BoundPolicy
from service.policy_file import ApiKey, Policies, Right
from service.policy_store import PolicyStore
from service.pool import Lane, Pool
from service.prompt_size import check_size
from service.settings import Settings
from service.strict_json import parse_object
from service.tracing import Span

T = TypeVar("T")


@dataclass(frozen=True)
class Gateway:
    """Everything that requests share."""

    settings: Settings
    store: PolicyStore
    keys: Keyring
    pool: Pool
    judges: Judges
    limits: KeyLimits
    metrics: Metrics
    prompt_digest: PromptDigest | None = None
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process was told to stop."""


@dataclass(frozen=True)
class Arrival:
    """One authenticated request whose body has been read."""

    gateway: Gateway
    request: Request
    record: AuditRecord
    policies: Policies
    """The policies in force when it was admitted, which stay in force for it."""
    key: ApiKey | None
    body: dict[str, Any]
    arrived: float
    """``time.perf_counter()`` when the body was complete."""

    def validate(self, model: type[Body]) -> Body:
        """The body as its route describes it. Raises ApiError 400."""
        body = validate(model, self.body)
        check_size(self.body, self.gateway.settings)
        return body

    def call(self, model: str | None) -> Call:
        """The request as one to the engine, for this model; None: whatever is served.

        Raises ApiError 404 unless the engine serves ``model``, 503 when it is not ready.
        """
        lane = self.gateway.pool.serving(model)
        model = lane.engine.status.model if model is None else model
        self.record.model = model
        if self.gateway.prompt_digest is not None:
            self.record.prompt_hmac = self.gateway.prompt_digest.of(self.body)
        name = self.policies.policy_for(self.key, model)
        self.record.policy = name
        start = conversation(self.body) if self.gateway.settings.affinity else None
        return Call(self, lane, lane.engine.policy(self.policies, name), model, start)


@dataclass(frozen=True)
class Call:
    """A request to an engine, under the policy that it falls under."""

    arrival: Arrival
    lane: Lane
    """An engine that serves the model; the one that a request is sent to last, once one was."""
    bound: BoundPolicy
    """The policy with that engine's thresholds."""
    model: str
    conversation: bytes | None = None
    """What requests of one conversation share, for affinity."""

    def sent_to(self, lane: Lane) -> Call:
        """The same request as one to another engine. Raises ApiError 503."""
        return replace(self, lane=lane, bound=lane.engine.policy(self.arrival.policies, self.bound.name))

    @property
    def gateway(self) -> Gateway:
        """What all requests share."""
        return self.arrival.gateway

    @property
    def cache_salt(self) -> dict[str, str]:
        """A field for the forwarded body: prompts share blocks of vLLM's prefix cache under equal salts only.

        Keyed, so that nobody who reaches vLLM itself can guess it; clients may not send this field.
        """
        if self.bound.policy.prefix_cache == "shared":
            return {}
        tenant = self.arrival.key.tenant if self.arrival.key is not None else ""
        return {"cache_salt": self.gateway.keys.name("cache-salt", tenant.encode())}

    def shown(self, verdict: Verdict | None) -> float | None:
        """P(unsafe) if the client may see it: a score is an oracle for attackers."""
        return verdict.probability if verdict is not None and self.bound.policy.expose_score else None

    @property
    def record(self) -> AuditRecord:
        """The request's audit record."""
        return self.arrival.record


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request came to."""
    return cast(Gateway, request.app.state.gateway)


def span_of(request: Request) -> Span:
    """The span of a request."""
    return cast(Span, request.state.span)


def record_of(request: Request) -> AuditRecord:
    """The audit record of a request."""
    return cast(AuditRecord, request.state.record)


def admit(request: Request, *rights: Right) -> tuple[Policies, ApiKey | None]:
    """Authenticate a request that needs one of ``rights``. Raises ApiError 401 or 403."""
    policies, record = gateway_of(request).store.current, record_of(request)
    key = authenticate(policies, request.headers)
    record.tenant = key.tenant if key is not None else None
    require(key, *rights)
    return policies, key


async def begin(request: Request, *rights: Right) -> Arrival:
    """Admit a request and read its body. Raises ApiError.

    It counts against the limits of its key from here to the last byte of its answer.
    """
    gateway = gateway_of(request)
    policies, key = admit(request, *rights)
    request.state.held.enter_context(gateway.limits.request(key))
    gateway.pool.require()  # before the body is read
    body = await _read(request, gateway.settings)
    arrived = time.perf_counter()
    value = parse_object(body, max_depth=gateway.settings.max_json_depth)
    return Arrival(gateway, request, record_of(request), policies, key, value, arrived)


async def _read(request: Request, settings: Settings) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Web pages can send other types to a loopback port without asking the browser's permission first.
    if media_type != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            415,
            "Send the body as 'content-type: application/json', not compressed.",
            code="unsupported_media_type",
            stage="request",
        )
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0
    if size > limit:
        raise _too_long(limit)
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_long(limit)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, "The request body did not arrive in time.", code="request_timeout", stage="request"
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    if not size:
        raise bad_request("The request has no body.", code="invalid_json")
    return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is longer than {limit} bytes.",
        code="request_too_large",
        stage="request",
        headers={"connection": "close"},
    )


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, but stop it as soon as the client has closed its connection.

    Needs a request whose body has been read. Raises ClientGoneError.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
