"""From a validated body to what the client gets: a refusal, a whole answer, or a stream."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.responses import JSONResponse, Response

from guard.verdict import UNSCORED_SHAPE
from service import drill
from service.backend import BackendError
from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.errors import ApiError, bad_request, bad_upstream
from service.exchange import Forward, Judged, as_it_is, exchange, prompt_field
from service.gateway import Arrival, Call, unless_gone
from service.judge import turns_of
from service.moderation import blocking, report
from service.refusal import RefusedAnswer, Route
from service.relay import EVENT_STREAM, STREAM_HEADERS, RelayedStream, held
from service.stops import Stops
from service.stream import completion_tokens, parse_json_object
from service.strict_json import dump


async def generate(arrival: Arrival, body: ChatBody | CompletionBody, route: Route) -> Response:
    """Answer a generating request. Raises ApiError and ClientGoneError."""
    call = arrival.call(body.model)
    limit = call.gateway.settings.max_siblings
    if body.siblings > limit:
        raise bad_request(
            f"The request asks for {body.siblings} answers; at most {limit} are allowed.", param="n"
        )
    moderation = body.moderation if isinstance(body, ChatBody) else None
    narrowed = moderation is not None and moderation.blocks
    if call.gateway.settings.test_string and drill.asked_for(body):
        return _rehearsed(call, body, route)
    forward = Forward(
        path="/v1/chat/completions" if route == "chat" else "/v1/completions",
        body=body.forwarded(call.cache_salt),
        siblings=body.siblings,
        stream=body.streamed,
        order=blocking if narrowed else as_it_is,
        turns=lambda: turns_of(arrival.body),
    )
    receive = arrival.request.receive
    judged = await unless_gone(receive, exchange(call, forward))
    finding = _finding(call, judged) if moderation is not None else None
    ready = judged.judged
    try:
        if judged.action == "refuse":
            if judged.verdict is not None and judged.verdict.reason == UNSCORED_SHAPE:
                raise _other_shape(call, judged)
            # Whatever the engine put into the body: it is not read, and the connection is closed at once.
            await judged.answer.close()
            tokens = judged.verdict.prompt_tokens if judged.verdict else 0
            response = _refused(call, body, route, guard_headers(call, judged), tokens, finding)
        else:
            stops = Stops(judged, route)
            if body.streamed and judged.answer.media_type != EVENT_STREAM:
                raise bad_upstream("The model's server sent something that is not a stream.")
            if body.streamed and not stops.withdraws:
                response = RelayedStream(judged, stops, finding, guard_headers(call, judged))
            else:
                read = _held if body.streamed else _whole
                response = await unless_gone(receive, read(call, judged, stops, body.siblings, finding))
                ready = time.perf_counter()  # reading the answer is the engine's time
    except BaseException:
        await judged.answer.close()
        raise
    call.gateway.metrics.overhead.observe(judged.sent - arrival.arrived + time.perf_counter() - ready)
    return response


def _finding(call: Call, judged: Judged) -> dict[str, Any]:
    """What a client is told that asked for OpenAI's moderation results."""
    flagged = None
    if judged.verdict is not None:
        flagged = judged.action == "refuse" or (judged.said != "pass" and judged.escalated != "pass")
    return report(call.model, flagged, call.shown(judged.verdict))


def guard_headers(call: Call, judged: Judged, *, stopped: bool = False) -> dict[str, str]:
    """What a client is told of the verdict, or that one of the choices was stopped."""
    action = "stop" if stopped else judged.action
    headers = {"x-guard-action": action, "x-guard-policy": call.bound.name}
    if judged.action == "patch" and judged.verdict is not None and judged.verdict.patch is not None:
        headers["x-guard-patch"] = judged.verdict.patch
    score = call.shown(judged.verdict)
    if score is not None:
        headers["x-guard-score"] = f"{score:.6f}"
    return headers


def _other_shape(call: Call, judged: Judged) -> ApiError:
    """Not a refusal in the policy's style: the form of the request is wrong, which its client can mend."""
    call.record.completion_tokens = 0
    return ApiError(
        400,
        "The prompt does not end as this model's chat template ends prompts, so it cannot be judged. "
        "Use POST /v1/chat/completions, or end the prompt with the template's header of the answer.",
        code="unscored_prompt_shape",
        stage="request",
        param=prompt_field(call),
        headers=guard_headers(call, judged),
    )


def _rehearsed(call: Call, body: ChatBody | CompletionBody, route: Route) -> Response:
    """The refusal that the test string asks for. Nobody judged, which audit, metrics and headers say."""
    record = call.record
    record.mode, record.stream = call.bound.decision.mode, body.streamed
    record.verdict, record.action = drill.ASKED, "refuse"
    call.gateway.metrics.test_refusals.labels(call.bound.name).inc()
    headers = {"x-guard-action": "refuse", "x-guard-policy": call.bound.name, drill.HEADER: "refusal"}
    wished = isinstance(body, ChatBody) and body.moderation is not None
    return _refused(call, body, route, headers, 0, report(call.model, True, None) if wished else None)


def _refused(
    call: Call,
    body: ChatBody | CompletionBody,
    route: Route,
    headers: dict[str, str],
    prompt_tokens: int,
    finding: dict[str, Any] | None,
) -> Response:
    refused = RefusedAnswer(
        route=route,
        refusal=call.bound.policy.refusal,
        request_id=call.record.request_id,
        model=body.model,
        siblings=body.siblings,
        prompt_tokens=prompt_tokens,
        moderation=finding,
    )
    call.record.completion_tokens = 0
    error = refused.error()
    if error is not None:
        call.record.code = error[1]["error"]["code"]
        return JSONResponse(error[1], error[0], headers=headers)
    if not body.streamed:
        return JSONResponse(refused.body(), headers=headers)
    frames = b"".join(refused.frames(include_usage=body.include_usage))
    return Response(frames, headers=headers | STREAM_HEADERS, media_type=EVENT_STREAM)


async def _whole(
    call: Call, judged: Judged, stops: Stops, siblings: int, finding: dict[str, Any] | None
) -> Response:
    """A passed answer, read to its end, looked at, and handed on byte for byte.

    Written anew are only answers of which a choice was stopped, or that hold a finding asked for.
    """
    settings, answer = call.gateway.settings, judged.answer
    try:
        async with asyncio.timeout(settings.answer_timeout):
            content = await answer.read(settings.max_answer_bytes)
    except (BackendError, TimeoutError) as error:
        raise bad_upstream("The model's answer was cut off.", code="upstream_interrupted") from error
    finally:
        await answer.close()
    value = parse_json_object(content) if answer.media_type == "application/json" else None
    if value is None or not isinstance(value.get("choices"), list):
        raise bad_upstream("The model's server sent something that is not an answer.")
    call.gateway.metrics.first_byte.observe(judged.judged - judged.sent)
    call.record.completion_tokens = completion_tokens(value)
    shown = stops.of_answer(value)
    headers = guard_headers(call, judged, stopped=shown is not None)
    refused = stops.error(siblings)
    if refused is not None:
        return JSONResponse(refused[1], refused[0], headers=headers)
    if finding is not None:
        shown = (shown or value) | {"moderation": finding}
    if shown is not None:
        content = dump(shown)
    return Response(content, headers=headers, media_type="application/json")


async def _held(
    call: Call, judged: Judged, stops: Stops, siblings: int, finding: dict[str, Any] | None
) -> Response:
    """A passed stream that may still be withdrawn: nothing of it is sent before it has ended."""
    frames = await held(judged, stops, finding)
    headers = guard_headers(call, judged, stopped=bool(stops.found))
    refused = stops.error(siblings)
    if refused is not None:
        return JSONResponse(refused[1], refused[0], headers=headers)
    return Response(b"".join(frames), headers=headers | STREAM_HEADERS, media_type=EVENT_STREAM)
