"""An HTTP answer that is held back until its verdict is bound. Plain ASGI, no vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from guard.engine.exchange import Exchange

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]


async def read_body(receive: Receive) -> bytes | None:
    """The whole request body, or None when the client left before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def answer_json(send: Send, status: int, document: Any, *headers: Header) -> None:
    """Send a document as a complete answer."""
    await answer_bytes(send, status, json.dumps(document).encode(), *headers)


async def answer_bytes(send: Send, status: int, body: bytes, *headers: Header) -> None:
    """Send a complete answer that is JSON already."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class HeldAnswer:
    """Stands between a handler and the client of one directed request.

    The handler sees the body that was already read and may send at any time. Errors (status 400 and above)
    go through, since they hold nothing of the model. Anything else waits: the status line is kept, and the
    first part of the body blocks the handler until ``release``.
    """

    def __init__(self, exchange: Exchange, body: bytes, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._body: bytes | None = body
        self._receive, self._send = receive, send
        self._start: Message | None = None
        self._gate = asyncio.Event()
        self._headers: tuple[Header, ...] = ()
        self.passed_error = False
        """The handler has answered with an error status, which went through."""
        self.unjudged = asyncio.Event()
        """The handler has begun a good answer without having asked the engine for anything."""
        self.first_part = b""
        """Beginning of the body that waits behind ``unjudged``."""
        self._left = asyncio.Event()

    async def client_left(self) -> None:
        """Return when the client has disconnected. The only reader of the connection from here on."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()

    async def receive(self) -> Message:
        """The handler's side of the connection."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """The handler's answer, held as described above."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self.passed_error = True
        if self.passed_error:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._start = message
        else:
            if not self._exchange.request_ids and not self._gate.is_set():
                self.first_part = message.get("body", b"")
                self.unjudged.set()
            await self._gate.wait()
            if self._start is not None:
                start, self._start = self._start, None
                await self._send({**start, "headers": [*start.get("headers", ()), *self._headers]})
            await self._send(message)

    def release(self, *headers: Header) -> None:
        """Let the answer out, with these headers added."""
        self._headers = headers
        self._gate.set()

    async def replace(self, status: int, document: Any, *headers: Header) -> None:
        """Answer in the handler's place; what it sent so far is never shown."""
        await answer_json(self._send, status, document, *headers)


def stream_error(first_part: bytes) -> tuple[int, Any] | None:
    """Status and body of an error that a handler reported as the first frame of a 200 stream.

    vLLM validates some parameters only when the stream is first read, and then has no status line left. No
    engine request exists at that point, so the frame holds nothing of the model. None when it is no error.
    """
    frame = first_part.removeprefix(b"data: ").strip()
    try:
        document = json.loads(frame)
        code = int(document["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None
    return (code, document) if 400 <= code < 600 else None
