"""What the proxies of the comparison share: kept connections, forwarding as bytes arrive, one refusal.

A proxy is an aiohttp application with one route. How long its stages took it says in a ``server-timing``
header (W3C), in milliseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

REFUSAL = "I cannot help with that."
CHAT = "/v1/chat/completions"
Ask = Callable[["Exchange"], Awaitable[web.StreamResponse]]


class Exchange:
    """One request to a proxy."""

    def __init__(self, request: web.Request, raw: bytes, session: ClientSession) -> None:
        self.request = request
        self.raw = raw
        self.body: dict[str, Any] = json.loads(raw)
        self.session = session
        self._stages: dict[str, float] = {}
        self._last = time.perf_counter()

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return str(self.body["messages"][-1]["content"])

    def passed(self, stage: str) -> None:
        """The time since the last stage's end was this stage's."""
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + 1e3 * (now - self._last)
        self._last = now

    def headers(self, action: str) -> dict[str, str]:
        """Headers of the answer: what was done, and what took how long."""
        timing = ", ".join(f"{stage};dur={ms:.3f}" for stage, ms in self._stages.items())
        return {"x-guard-action": action, "server-timing": timing}

    @asynccontextmanager
    async def generate(self, url: str, **headers: str) -> AsyncIterator[ClientResponse]:
        """Send the client's own body on; the answer's head has arrived."""
        headers = {"content-type": "application/json"} | headers
        async with self.session.post(url + CHAT, data=self.raw, headers=headers) as answer:
            yield answer

    async def copy(self, answer: ClientResponse) -> web.StreamResponse:
        """Give the client what arrives, when it arrives."""
        first = await answer.content.readany()
        self.passed("generate")
        response = web.StreamResponse(status=answer.status, headers=self.headers("pass"))
        response.content_type = answer.content_type
        await response.prepare(self.request)
        await response.write(first)
        async for part in answer.content.iter_any():
            await response.write(part)
        await response.write_eof()
        return response

    async def refuse(self) -> web.StreamResponse:
        """The refusal, in the form that was asked for."""
        if not self.body.get("stream"):
            message = {"role": "assistant", "content": REFUSAL}
            choice = {"index": 0, "message": message, "finish_reason": "content_filter"}
            return web.json_response(
                {"object": "chat.completion", "model": self.body["model"], "choices": [choice]},
                headers=self.headers("refuse"),
            )
        response = web.StreamResponse(headers=self.headers("refuse"))
        response.content_type = "text/event-stream"
        await response.prepare(self.request)
        await response.write(refusal_frames(self.body["model"]))
        await response.write_eof()
        return response


def refusal_frames(model: str) -> bytes:
    """The refusal as the end of a stream."""
    choice = {"index": 0, "delta": {"content": REFUSAL}, "finish_reason": "content_filter"}
    frame = {"object": "chat.completion.chunk", "model": model, "choices": [choice]}
    return b"data: " + json.dumps(frame).encode() + b"\n\ndata: [DONE]\n\n"


def application(answer: Ask) -> web.Application:
    """A proxy that answers every chat request by ``answer``."""
    session: list[ClientSession] = []

    async def connected(_: web.Application) -> AsyncIterator[None]:
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(120)) as opened:
            session.append(opened)
            yield

    async def chat(request: web.Request) -> web.StreamResponse:
        return await answer(Exchange(request, await request.read(), session[0]))

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=16 << 20)
    app.cleanup_ctx.append(connected)
    app.router.add_post(CHAT, chat)
    app.router.add_get("/health", health)
    return app


def serve(answer: Ask, port: int) -> None:
    """Serve until stopped."""
    web.run_app(application(answer), host="127.0.0.1", port=port, access_log=None, print=None)
