"""HTTP to engines by aiohttp, behind httpx's seam for transports (docs/decisions/http-client.md).

Errors are httpx's, and tell whether a byte of the request can have been sent: ConnectError and ConnectTimeout
say that there was no connection. Nothing is retried, decompressed or redirected here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import httpx

from guard.sealed import MAX_SEALED_CHARS

_CHUNK = 1 << 16


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Keeps up to ``connections`` connections to one server, and idle ones for ``keepalive`` seconds."""

    def __init__(self, *, connections: int, keepalive: float, connect_timeout: float, retries: int) -> None:
        self._connections = connections
        self._keepalive = keepalive
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout)
        self._retries = retries
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and wait for status and headers of its answer. Raises httpx.TransportError."""
        content = await request.aread()
        for attempt in range(self._retries + 1):
            try:
                answer = await self._send(request, content)
                break
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if attempt == self._retries:
                    raise
                await asyncio.sleep(0.5 * attempt)  # nothing was sent; longer each time
        return httpx.Response(answer.status, headers=list(answer.raw_headers), stream=_Body(answer))

    async def _send(self, request: httpx.Request, content: bytes) -> aiohttp.ClientResponse:
        try:
            return await self._open().request(
                request.method,
                str(request.url),
                data=content,
                headers=[
                    (name, value) for name, value in request.headers.items() if name != "content-length"
                ],
                allow_redirects=False,
                timeout=self._timeout,
            )
        except aiohttp.ClientConnectorError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise httpx.ConnectTimeout(str(error), request=request) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise httpx.RemoteProtocolError(type(error).__name__, request=request) from error

    def _open(self) -> aiohttp.ClientSession:
        """The session, made where an event loop runs."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections, keepalive_timeout=self._keepalive, force_close=False
                ),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # a proxy from the environment must not see prompts
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                read_bufsize=_CHUNK,
                max_field_size=2 * MAX_SEALED_CHARS,  # a sealed verdict is one header
            )
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class _Body(httpx.AsyncByteStream):
    """An answer's body as it arrives."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._answer.content.iter_any():
                yield part
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise httpx.RemoteProtocolError(type(error).__name__) from error

    async def aclose(self) -> None:
        """Before the end of the body this closes the connection, which aborts the request at the server."""
        if self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()
