"""Server-sent events on their way through: cut into frames, looked at, passed on byte for byte."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from service.errors import error_body

# Any two line ends in a row close a frame. The first must not be the CR of a CRLF.
_FRAME_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class StreamError(ValueError):
    """An upstream stream is not what it should be; nothing more of it may be passed on."""


class SseDecoder:
    """Cuts a byte stream into frames, whatever the chunks it arrives in.

    A frame includes the empty line that ends it, so that the frames joined are the bytes that went in.
    Raises StreamError for a frame longer than ``max_frame``.
    """

    def __init__(self, max_frame: int = 1 << 20) -> None:
        self._max_frame = max_frame
        self._buffer = b""
        self._searched = 0

    def decode(self, data: bytes) -> list[bytes]:
        """The frames that ``data`` completes."""
        buffer = self._buffer + data
        frames = []
        start = 0
        position = self._searched
        while match := _FRAME_END.search(buffer, position):
            if match.end() == len(buffer) and buffer.endswith(b"\r"):
                break  # the LF of a CRLF may be the next byte
            frames.append(buffer[start : match.end()])
            start = position = match.end()
        self._buffer = buffer[start:]
        # The end of a frame is at most four bytes long, and all but the last may be here already.
        self._searched = max(0, len(self._buffer) - 3)
        if len(self._buffer) > self._max_frame or any(len(frame) > self._max_frame for frame in frames):
            raise StreamError("a frame of the stream is too long")
        return frames

    def flush(self) -> list[bytes]:
        """The frame that the end of the stream completes, if any. A frame that was cut off is dropped."""
        rest, self._buffer, self._searched = self._buffer, b"", 0
        return [rest] if _FRAME_END.search(rest) else []


@dataclass
class AnswerWatch:
    """What the gateway has to know of a stream that it passes on: is it sound, and did it end?"""

    finished: bool = False
    """``[DONE]`` was seen."""
    failed: bool = False
    """The engine itself sent an error frame."""
    completion_tokens: int | None = None
    """From the usage frame, when the client asked for one."""
    head: dict[str, Any] = field(default_factory=dict)
    """What all chunks of this stream have in common."""

    def look(self, frame: bytes) -> None:
        """Note what one frame says. Raises StreamError when its data is not a JSON object."""
        payload = data_of(frame)
        if payload is None:
            return
        if payload == b"[DONE]":
            self.finished = True
            return
        # A model's text is not looked at: it is a JSON object by its ends, or something else altogether.
        if not (payload.startswith(b"{") and payload.endswith(b"}")):
            raise StreamError("a frame of the stream is not a JSON object")
        if self.head and b'"usage"' not in payload and b'"error"' not in payload:
            return
        value = parse_json_object(payload)
        if value is None:
            raise StreamError("a frame of the stream is not a JSON object")
        if not self.head:
            self.head = {name: value.get(name) for name in ("id", "object", "created", "model")}
        if value.get("error") is not None:
            self.failed = True
        self.completion_tokens = completion_tokens(value) or self.completion_tokens

    def chunk(self, members: dict[str, Any]) -> bytes:
        """A frame of the gateway's own that fits into this stream."""
        value = self.head | {"choices": []} | members
        return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def data_of(frame: bytes) -> bytes | None:
    """The data lines of a frame, joined; None for a frame without any, such as a comment."""
    lines = [line[5:].removeprefix(b" ") for line in _LINE_END.split(frame) if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def parse_json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data``, or None when there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def completion_tokens(answer: dict[str, Any]) -> int | None:
    """``usage.completion_tokens`` of an answer or a frame, if it is there."""
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def error_frame(message: str, code: str) -> bytes:
    """A frame at which SDKs raise. No ``[DONE]`` may follow it."""
    body = error_body(message, kind="server_error", code=code)
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
