"""Passed streams: sent on frame by frame, or held back until they have ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.backend import BackendError, TooSlowError
from service.errors import bad_upstream
from service.exchange import Judged
from service.gateway import unless_gone
from service.stops import Stops
from service.stream import AnswerWatch, SseDecoder, StreamError, error_frame

EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class RelayedStream(StreamingResponse):
    """A passed stream: frames go out unchanged as they come in, until ``[DONE]``; stops are written anew.

    When the stream breaks off, the client gets an error frame and no ``[DONE]``, at which SDKs raise. When
    the client goes away, the connection to the engine is closed at once, which stops the generation.
    """

    def __init__(
        self, judged: Judged, stops: Stops, finding: dict[str, Any] | None, headers: dict[str, str]
    ) -> None:
        self._judged, self._stops, self._finding = judged, stops, finding
        super().__init__((), headers=headers | STREAM_HEADERS, media_type=EVENT_STREAM)

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
        record = self._judged.call.record
        watch = AnswerWatch()
        try:
            async with aclosing(_sound_frames(self._judged, self._stops, self._finding, watch)) as frames:
                async for frame in frames:
                    yield frame
        except (BackendError, StreamError):
            yield self._interrupted()
        else:
            if watch.failed:
                record.outcome = "interrupted"
                self._judged.call.gateway.metrics.errors.labels("stream", "closed").inc()
        record.completion_tokens = watch.completion_tokens

    def _interrupted(self) -> bytes:
        record = self._judged.call.record
        record.outcome, record.code = "interrupted", "upstream_interrupted"
        self._judged.call.gateway.metrics.errors.labels("stream", "closed").inc()
        return error_frame("The model's answer was cut off.", "upstream_interrupted")


async def held(judged: Judged, stops: Stops, finding: dict[str, Any] | None) -> list[bytes]:
    """The frames of a stream that may be withdrawn, once it has ended; closes the engine's answer.

    Raises ApiError 502 when it does not end as it should, or is longer than an answer may be: nothing of it
    has been shown, so nothing is.
    """
    watch, frames, size = AnswerWatch(), list[bytes](), 0
    limit = judged.call.gateway.settings.max_answer_bytes
    try:
        async with aclosing(_sound_frames(judged, stops, finding, watch)) as sound:
            async for frame in sound:
                size += len(frame)
                if size > limit:
                    raise StreamError("the stream is too long to be held back")
                frames.append(frame)
        if watch.failed:
            raise StreamError("the engine could not finish the stream")
    except (BackendError, StreamError) as error:
        raise bad_upstream("The model's answer was cut off.", code="upstream_interrupted") from error
    finally:
        await judged.answer.close()
    judged.call.record.completion_tokens = watch.completion_tokens
    return list(stops.withdrawn(frames, watch)) if stops.found else frames


async def _sound_frames(
    judged: Judged, stops: Stops, finding: dict[str, Any] | None, watch: AnswerWatch
) -> AsyncGenerator[bytes]:
    metrics, settings, answer = judged.call.gateway.metrics, judged.call.gateway.settings, judged.answer
    decoder = SseDecoder(settings.max_answer_bytes)
    ends = time.perf_counter() + settings.answer_timeout
    first = True
    async for chunk in answer.chunks():
        if first:
            metrics.first_byte.observe(time.perf_counter() - judged.sent)
            first = False
        for frame in decoder.decode(chunk):
            watch.look(frame)
            if watch.finished and finding is not None:
                yield watch.chunk({"moderation": finding})
            yield stops.of_frame(frame)
            if watch.finished:
                return
        if time.perf_counter() > ends:
            raise TooSlowError("the answer took too long")
    for frame in decoder.flush():
        watch.look(frame)
        yield stops.of_frame(frame)
    if not watch.finished:
        raise StreamError("the stream ended before its end was announced")
