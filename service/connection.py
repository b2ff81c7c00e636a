"""Bounds on what a client may send that the application never sees.

uvicorn calls the application when a request's headers are complete, and from there the gateway has a deadline
for everything. A client that never gets that far would keep its connection, and memory, for as long as it
likes, and so would one that sends headers after the body (uvicorn/protocols/http/httptools_impl.py).
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings


class BoundedProtocol(HttpToolsProtocol):
    """One connection, closed without an answer when the headers of a request do not come in time."""

    head_timeout: ClassVar[float]
    max_head: ClassVar[int]

    _deadline: asyncio.TimerHandle | None = None
    """Runs while a request's headers are awaited."""
    _head = 0
    """Bytes that came outside of bodies since the last request began."""
    _in_head = False
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._deadline is None and self.cycle is not None and self.cycle.response_complete:
            self._await_head()  # the next request of a connection that was kept, or the rest of this one
        if not self._in_body:
            self._head += len(data)
        super().data_received(data)
        if self._head > self.max_head:
            self._close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for what stands behind a body: that is dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head, self._in_body = False, True
        self._head = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._in_body = False
        super().on_message_complete()

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout, self._close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._stop_waiting()
        self.logger.warning("A connection was closed: the headers of a request are too long or too late.")
        self.transport.close()


def bounded(settings: Settings) -> type[BoundedProtocol]:
    """The protocol with the bounds of these settings."""
    bounds = {"head_timeout": settings.head_timeout, "max_head": settings.max_head_bytes}
    return type("BoundedProtocol", (BoundedProtocol,), bounds)
