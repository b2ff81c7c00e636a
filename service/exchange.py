"""One exchange with the engine: a directive out, a verdict back, before anything else may happen.

The only function here that returns an answer of the engine is ``exchange``, and it does so only with the
verdict that belongs to it.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from guard.verdict import DIRECTIVE_HEADER, VERDICT_HEADER, Decision, Verdict, VerdictError
from service import tracing
from service.backend import BackendError, EngineAnswer, TooSlowError, UnreachableError
from service.directives import Order
from service.engine import EngineWatch
from service.errors import RETRY_AFTER, ApiError, bad_request, bad_upstream, unavailable, unknown_model
from service.gateway import Call, span_of
from service.judge import Turn
from service.policy import judged_safe
from service.request_log import REQUEST_ID_HEADER

logger = logging.getLogger("neuronguard.gateway")

UNGUARDED = "unguarded"
_TOO_LONG = re.compile(
    r"maximum context length|max_model_len|maximum model length|maximum input length", re.I
)
_FIELD = re.compile(r"[\w.\[\]]{1,100}", re.ASCII)
_UNCHECKED = "The request could not be checked and was not answered. Try again later."
_REASON = re.compile(r"refused: ([a-z_]{1,40})\b")


def as_it_is(decision: Decision) -> Decision:
    """The order of a request under its policy and nothing else."""
    return decision


@dataclass(frozen=True)
class Forward:
    """What is sent to the engine."""

    path: str
    body: bytes
    siblings: int
    stream: bool
    order: Callable[[Decision], Decision]
    """From what the policy says with an engine's thresholds to what that engine is told."""
    turns: Callable[[], list[Turn] | None]
    """The conversation as a judge reads it, made only when one is asked; None: there is no text."""


@dataclass(frozen=True)
class Judged:
    """An answer of the engine with its verdict, None only under ``on_missing_verdict: open``."""

    call: Call
    """The request as one to the engine that answered."""
    decision: Decision
    """What that engine was told."""
    nonce: str
    """Of the directive that told it."""
    answer: EngineAnswer
    verdict: Verdict | None
    sent: float
    """``time.perf_counter()`` just before the request went out."""
    judged: float
    """``time.perf_counter()`` when the verdict was here."""
    escalated: Literal["pass", "refuse"] | None = None
    """What was decided about a request that the rules escalated."""

    @property
    def said(self) -> str:
        """What the rules said."""
        if self.escalated is not None:
            return "escalate"
        return (self.verdict.decision if self.verdict else None) or "none"

    @property
    def action(self) -> str:
        """What was done, as clients and metrics are told."""
        if self.escalated == "refuse":
            return "refuse"
        return self.verdict.action if self.verdict else UNGUARDED


async def exchange(call: Call, forward: Forward) -> Judged:
    """Send a request under a directive and wait for its verdict.

    The caller closes the answer. Raises ApiError: whatever else the engine said is then already dropped.
    """
    try:
        judged = await _exchange(call, forward)
        if judged.action == "escalate":
            judged = await _escalate(call, forward, judged)
    except BaseException:  # a client that goes away cancels this; its request was sent all the same
        _count(call, forward, None)
        raise
    _count(call, forward, judged)
    return judged


async def _escalate(call: Call, forward: Forward, judged: Judged) -> Judged:
    """Ask the judge about a request that the engine has ended for it, and send it again if it may pass.

    The second directive is bound to the same bytes, and its rules still refuse what they refused: a judge can
    widen nothing but the band that it was asked about.
    """
    await judged.answer.close()
    if await decide(judged.call, forward, judged.verdict) == "refuse":
        return replace(judged, escalated="refuse")
    again = await _exchange(call, replace(forward, order=lambda said: forward.order(judged_safe(said))))
    if again.action not in ("pass", "tag", UNGUARDED):
        return again
    return replace(again, escalated="pass")


async def decide(call: Call, forward: Forward, verdict: Verdict | None) -> Literal["pass", "refuse"]:
    """What becomes of an escalated request: the judge's opinion, or its ``on_error``."""
    if verdict is None or verdict.probability is None:
        return "refuse"
    name, judge = call.arrival.policies.judge(call.bound.judge(verdict.probability))
    outcome = await call.gateway.judges.ask(name, judge, forward.turns())
    call.record.judge = outcome
    if outcome == "failed":
        return judge.on_error
    return "refuse" if outcome == "unsafe" else "pass"


async def _exchange(call: Call, forward: Forward) -> Judged:
    """One run on one engine. Where no connection was made nothing was sent, and another engine is tried."""
    pool, tried = call.gateway.pool, set[EngineWatch]()
    while True:
        lane = pool.choose(call.model, tried, call.conversation)
        call = call.sent_to(lane)
        try:
            return await _run(call, forward)
        except _NotSentError as error:
            tried.add(lane.watch)
            if len(tried) == len(pool.watches):
                raise _no_answer(error.reason) from error
            try:
                pool.choose(call.model, tried, None)
            except ApiError:
                raise _no_answer(error.reason) from error
            call.gateway.metrics.retries.inc()


class _NotSentError(Exception):
    """The engine has not seen a byte of the request."""

    def __init__(self, reason: BackendError) -> None:
        super().__init__(str(reason))
        self.reason = reason


async def _run(call: Call, forward: Forward) -> Judged:
    gateway, settings, watch = call.gateway, call.gateway.settings, call.lane.watch
    decision = forward.order(call.bound.decision)
    order = Order.issue(
        decision,
        gateway.keys,
        audience=call.lane.engine.status.audience,
        body=forward.body,
        siblings=forward.siblings,
        lifetime=settings.directive_lifetime,
    )
    # Without a stream the engine sends nothing before the whole answer is there, checks excepted.
    quick = forward.stream or decision.mode == "check"
    deadline = settings.verdict_timeout if quick else settings.answer_timeout
    span = span_of(call.arrival.request).child("guard.verdict")
    headers = _headers(call, span) | {DIRECTIVE_HEADER: order.sealed}
    call.record.engine = watch.backend.name
    noted: dict[str, tracing.Value] = {
        tracing.POLICY: call.bound.name,
        tracing.MODE: decision.mode,
        tracing.MODEL: call.model,
        tracing.ENGINE: watch.backend.name,
    }
    sent = time.perf_counter()
    watch.breaker.enter()
    try:
        answer = await watch.backend.send(forward.path, forward.body, headers, deadline)
    except BackendError as error:
        watch.failed()
        span.end(noted | {tracing.ERROR: type(error).__name__})
        logger.warning("request %s: %s: %s", call.record.request_id, watch.backend.name, error)
        if isinstance(error, UnreachableError):
            raise _NotSentError(error) from error
        raise _no_answer(error) from error
    except BaseException:  # the client has gone
        watch.breaker.gave_up()
        span.end(noted | {tracing.ERROR: "client_gone"})
        raise
    try:
        if not 200 <= answer.status < 300:
            raise await _upstream_error(call, answer)
        verdict = _verify(call, order, answer)
    except BaseException as error:
        watch.breaker.gave_up()
        span.end(noted | {tracing.ERROR: getattr(error, "code", type(error).__name__)})
        await answer.close()
        raise
    span.end(noted | (_found(verdict, settings.audit_scores) if verdict else {}))
    return Judged(call, decision, order.nonce, answer, verdict, sent, time.perf_counter())


def _found(verdict: Verdict, score: bool) -> dict[str, tracing.Value]:
    return {
        tracing.VERDICT: verdict.decision,
        tracing.ACTION: verdict.action,
        tracing.BUNDLE: verdict.bundle,
        tracing.PROBABILITY: verdict.probability if score else None,
    }


def _headers(call: Call, span: tracing.Span) -> dict[str, str]:
    """Headers for the engine, built from nothing: no header of the client goes through as it is.

    The engine's request ids must be unique, and a client's need not be.
    """
    upstream_id = uuid.uuid4().hex
    call.record.upstream_id = upstream_id
    headers = {REQUEST_ID_HEADER: upstream_id}
    if span.traceparent is not None:
        headers["traceparent"] = span.traceparent
    return headers


def _verify(call: Call, order: Order, answer: EngineAnswer) -> Verdict | None:
    metrics = call.gateway.metrics
    try:
        verdict = order.verify(answer.headers.get(VERDICT_HEADER), call.gateway.keys)
    except VerdictError as error:
        metrics.bypass.labels(error.reason).inc()
        call.lane.watch.failed()
        logger.error("request %s: no valid verdict (%s)", call.record.request_id, error.reason)
        # `open` is for an engine that says nothing. One that says something false is not to be believed.
        if error.reason == "missing" and call.bound.policy.on_missing_verdict == "open":
            metrics.errors.labels("verdict", "open").inc()
            return None
        raise unavailable(
            _UNCHECKED,
            code="guard_no_verdict",
            stage="verdict",
        ) from error
    if verdict.action == "error":
        call.lane.watch.failed()
        logger.error("request %s: the guard failed (%s)", call.record.request_id, verdict.reason)
        raise unavailable(
            _UNCHECKED,
            code="guard_failed",
            stage="guard",
        )
    if verdict.bundle == call.lane.engine.status.bundle:
        call.lane.watch.heard()
    else:
        call.lane.watch.look_again()
    return verdict


def _count(call: Call, forward: Forward, judged: Judged | None) -> None:
    record, metrics, model = call.record, call.gateway.metrics, call.model
    verdict = judged.verdict if judged else None
    said, action = (judged.said, judged.action) if judged else ("none", "none")
    mode = judged.decision.mode if judged else forward.order(call.bound.decision).mode
    record.mode, record.stream, record.verdict, record.action = mode, forward.stream, said, action
    metrics.requests.labels(call.bound.name, model, said, action, mode, str(forward.stream).lower()).inc()
    if judged is None or verdict is None:
        return
    record.bundle = verdict.bundle
    record.unscored_shape = verdict.unscored_shape or bool(record.unscored_shape)
    if verdict.unscored_shape:
        metrics.unscored_shapes.labels(call.bound.name, model, action).inc()
    record.prompt_tokens = (record.prompt_tokens or 0) + verdict.prompt_tokens
    if verdict.probability is not None:
        if not verdict.unscored_shape:  # or scores that mean something else would look like drift
            metrics.scored(model, judged.call.lane.engine.status, verdict.bundle, verdict.probability)
        if call.gateway.settings.audit_scores:
            record.probability = max(verdict.probability, record.probability or 0.0)
    if forward.stream or action != "pass":
        elapsed = time.perf_counter() - call.arrival.arrived
        record.verdict_seconds = round(elapsed, 6)
        metrics.time_to_verdict.observe(elapsed)


def _no_answer(error: BackendError) -> ApiError:
    if isinstance(error, UnreachableError):
        return unavailable(
            "The model cannot be reached. Try again later.", code="engine_unreachable", stage="backend"
        )
    if isinstance(error, TooSlowError):
        return ApiError(
            504,
            "The model did not answer in time.",
            code="engine_timeout",
            stage="backend",
            kind="server_error",
        )
    return bad_upstream("The model's server closed the connection without an answer.", code="engine_failed")


async def _upstream_error(call: Call, answer: EngineAnswer) -> ApiError:
    """What an error of the engine means to the client. Quoted are only messages about its own request."""
    message, code, param = _parse_error(await answer.error_body())
    if code == "guard_directive_invalid":
        call.lane.watch.look_again()
        reason = _REASON.search(message)
        logger.error(
            "request %s: the engine refused the directive (%s)",
            call.record.request_id,
            reason.group(1) if reason else "no reason given",
        )
        return unavailable(
            _UNCHECKED,
            code="guard_directive_refused",
            stage="directive",
        )
    if code == "guard_no_verdict":  # the engine held its answer back itself
        return unavailable(
            _UNCHECKED,
            code="guard_no_verdict",
            stage="guard",
        )
    if answer.status in (400, 413, 422):
        if _TOO_LONG.search(message):
            return bad_request(message, code="context_length_exceeded", param=prompt_field(call))
        return bad_request(message or "The model's server refused the request.", param=param)
    if answer.status == 404 and "does not exist" in message:
        call.lane.watch.look_again()
        return unknown_model(call.model)
    if answer.status == 429:
        return ApiError(
            429,
            "The model's server is overloaded. Try again later.",
            code="engine_overloaded",
            stage="backend",
            kind="rate_limit_error",
            headers=RETRY_AFTER,
        )
    if answer.status >= 500:
        call.lane.watch.failed()
    if answer.status == 503:
        return unavailable(
            "The model is not available. Try again later.", code="engine_unavailable", stage="backend"
        )
    return bad_upstream("The model's server failed to answer.", code="engine_failed")


def _parse_error(body: bytes) -> tuple[str, str, str | None]:
    """Message, code and field of an OpenAI error body; empty when it is not one."""
    try:
        error = json.loads(body)["error"]
        param = error.get("param")
        field = param if isinstance(param, str) and _FIELD.fullmatch(param) else None
        return str(error["message"])[:2000], str(error.get("code")), field
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", "", None


def prompt_field(call: Call) -> str:
    """The field of the body that holds the prompt."""
    return next((name for name in ("messages", "prompt", "input") if name in call.arrival.body), "messages")
