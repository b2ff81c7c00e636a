"""A gateway that keeps something of every request: memory, an open file and a task.

``python -m tests.loadtests.leaking_gateway``, with the settings of a gateway in the environment.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn

from service.app import create_app
from service.settings import load_settings

KEPT: list[Any] = []


class Leaking:
    """An ASGI application around the gateway's."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            KEPT.append(bytearray(b"x" * 500_000))
            KEPT.append(open("/dev/null"))  # noqa: ASYNC230, SIM115
            KEPT.append(asyncio.ensure_future(asyncio.Event().wait()))
        await self._app(scope, receive, send)


if __name__ == "__main__":
    settings = load_settings()
    uvicorn.run(Leaking(create_app(settings)), host=settings.host, port=settings.port, log_level="warning")
