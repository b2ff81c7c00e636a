"""From a validated body to what the client gets: a refusal, a whole answer, or a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from guard.verdict import UNSCORED_SHAPE
from service import drill
from service.backend import BackendError, TooSlowError
from service.chat_body import ChatBody
from service.completion_body import CompletionBody
from service.errors import ApiError, bad_request, bad_upstream
from service.exchange import Forward, Judged, as_it_is, exchange, prompt_field
from service.gateway import Arrival, Call, unless_gone
from service.judge import turns_of
from service.moderation import blocking, report
from service.refusal import RefusedAnswer
from service.stream import (
    AnswerWatch,
    SseDecoder,
    StreamError,
    completion_tokens,
    error_frame,
    parse_json_object,
)
from service.strict_json import dump

EVENT_STREAM = "text/event-stream"
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def generate(
    arrival: Arrival, body: ChatBody | CompletionBody, route: Literal["chat", "text"]
) -> Response:
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
        elif body.streamed:
            response = _relayed(call, judged, finding)
        else:
            response = await unless_gone(receive, _whole(call, judged, finding))
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


def guard_headers(call: Call, judged: Judged) -> dict[str, str]:
    """What a client is told of the verdict."""
    headers = {"x-guard-action": judged.action, "x-guard-policy": call.bound.name}
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


def _rehearsed(call: Call, body: ChatBody | CompletionBody, route: Literal["chat", "text"]) -> Response:
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
    route: Literal["chat", "text"],
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
    return Response(frames, headers=headers | _STREAM_HEADERS, media_type=EVENT_STREAM)


async def _whole(call: Call, judged: Judged, finding: dict[str, Any] | None) -> Response:
    """A passed answer, read to its end, looked at, and handed on byte for byte, a finding asked for aside."""
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
    if finding is not None:
        content = dump(value | {"moderation": finding})
    return Response(content, headers=guard_headers(call, judged), media_type="application/json")


def _relayed(call: Call, judged: Judged, finding: dict[str, Any] | None) -> Response:
    if judged.answer.media_type != EVENT_STREAM:
        raise bad_upstream("The model's server sent something that is not a stream.")
    return RelayedStream(call, judged, finding)


class RelayedStream(StreamingResponse):
    """A passed stream: frames go out unchanged as they come in, until ``[DONE]``.

    When the stream breaks off, the client gets an error frame and no ``[DONE]``, at which SDKs raise. When
    the client goes away, the connection to the engine is closed at once, which stops the generation.
    """

    def __init__(self, call: Call, judged: Judged, finding: dict[str, Any] | None) -> None:
        self._call = call
        self._judged = judged
        self._finding = finding
        headers = guard_headers(call, judged) | _STREAM_HEADERS
        super().__init__((), headers=headers, media_type=EVENT_STREAM)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, and let go of the engine whatever happens."""
        try:
            await unless_gone(receive, self._pump(send))
        finally:
            await self._judged.answer.close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._frames()) as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self) -> AsyncGenerator[bytes]:
        record = self._call.record
        watch = AnswerWatch()
        try:
            async with aclosing(self._sound_frames(watch)) as frames:
                async for frame in frames:
                    yield frame
        except (BackendError, StreamError):
            yield self._interrupted()
        else:
            if watch.failed:
                record.outcome = "interrupted"
                self._call.gateway.metrics.errors.labels("stream", "closed").inc()
        record.completion_tokens = watch.completion_tokens

    async def _sound_frames(self, watch: AnswerWatch) -> AsyncGenerator[bytes]:
        settings, answer = self._call.gateway.settings, self._judged.answer
        decoder = SseDecoder(settings.max_answer_bytes)
        ends = time.perf_counter() + settings.answer_timeout
        first = True
        async for chunk in answer.chunks():
            if first:
                self._call.gateway.metrics.first_byte.observe(time.perf_counter() - self._judged.sent)
                first = False
            for frame in decoder.decode(chunk):
                watch.look(frame)
                if watch.finished and self._finding is not None:
                    yield watch.chunk({"moderation": self._finding})
                yield frame
                if watch.finished:
                    return
            if time.perf_counter() > ends:
                raise TooSlowError("the answer took too long")
        for frame in decoder.flush():
            watch.look(frame)
            yield frame
        if not watch.finished:
            raise StreamError("the stream ended before its end was announced")

    def _interrupted(self) -> bytes:
        self._call.record.outcome = "interrupted"
        self._call.record.code = "upstream_interrupted"
        self._call.gateway.metrics.errors.labels("stream", "closed").inc()
        return error_frame("The model's answer was cut off.", "upstream_interrupted")
