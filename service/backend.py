"""The one seam to the engine. Nothing else in the gateway opens a connection.

BackendError
├── UnreachableError    no connection: nothing was sent
├── TooSlowError        a deadline passed
└── BrokenError         the connection broke, or the answer is not HTTP as agreed
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
from pydantic import ValidationError

from guard.sealed import Keyring, SealError
from guard.verdict import STATUS_PATH, STATUS_SEAL_HEADER, EngineStatus
from service.aiohttp_transport import AiohttpTransport
from service.settings import Settings

_MAX_STATUS_BYTES = 1 << 20
_MAX_ERROR_BYTES = 1 << 16
# vLLM's server closes idle connections after five seconds; a connection must be given up before that, or now
# and then a request would be sent into one that is just being closed.
_KEEPALIVE = 2.0
# Where no connection was made nothing was sent, so trying again is safe: at once, half a second later,
# and then a second. With several engines another one is tried instead.
_CONNECT_RETRIES = 3


_AGENT = {"accept-encoding": "identity", "user-agent": "neuronguard-gateway"}
_HEADERS = _AGENT | {"content-type": "application/json", "accept": "*/*"}


class BackendError(Exception):
    """The engine did not answer."""


class UnreachableError(BackendError):
    """No connection to the engine."""


class TooSlowError(BackendError):
    """A deadline passed."""


class BrokenError(BackendError):
    """The connection broke, or what came is not an HTTP answer as agreed."""


class EngineAnswer:
    """An answer whose status and headers are here and whose body is not read yet. Must be closed."""

    def __init__(
        self, response: httpx.Response, idle_timeout: float, closed: Callable[[], None] = lambda: None
    ) -> None:
        self._response = response
        self._closed: Callable[[], None] | None = closed
        self._idle_timeout = idle_timeout
        self.status = response.status_code
        self.headers = response.headers

    @property
    def media_type(self) -> str:
        """The content type without parameters."""
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises BackendError when it breaks off or pauses for too long."""
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise BrokenError("the engine's answer is compressed, which was not asked for")
        chunks = aiter(self._response.aiter_raw())
        while True:
            try:
                async with asyncio.timeout(self._idle_timeout):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise TooSlowError("the engine paused for too long") from error
            except (httpx.HTTPError, httpx.StreamError) as error:
                raise BrokenError(f"the engine's answer broke off ({type(error).__name__})") from error
            yield chunk

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises BackendError, also when it is longer than ``limit``."""
        parts, size = [], 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                raise BrokenError("the engine's answer is too long")
            parts.append(chunk)
        return b"".join(parts)

    async def error_body(self) -> bytes:
        """The body of an answer that is an error; empty when it cannot be read."""
        try:
            async with asyncio.timeout(self._idle_timeout):
                return await self.read(_MAX_ERROR_BYTES)
        except (BackendError, TimeoutError):
            return b""

    async def close(self) -> None:
        """Let go of the connection. Before the end of the body this aborts the request at the engine."""
        try:
            await self._response.aclose()
        finally:
            if self._closed is not None:
                closed, self._closed = self._closed, None
                closed()


class Backend:
    """The engine's HTTP server."""

    def __init__(
        self, url: str, settings: Settings, keys: Keyring, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._url = url
        self._settings = settings
        self._keys = keys
        self.outstanding = 0
        """Requests at the engine whose answers are not closed yet."""
        # The transport itself: what a client adds (redirects, cookies, authentication) is not wanted here.
        self._transport = transport or AiohttpTransport(
            connections=settings.max_connections,
            keepalive=_KEEPALIVE,
            connect_timeout=settings.connect_timeout,
            retries=0 if len(settings.engines) > 1 else _CONNECT_RETRIES,
        )
        self._urls: dict[str, httpx.URL] = {}
        # Its own connection, so that a full pool of requests cannot make the engine look dead.
        self._status = self._client(
            transport or httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1), trust_env=False)
        )

    def _client(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
        connect = self._settings.connect_timeout
        return httpx.AsyncClient(
            base_url=self._url,
            transport=transport,
            # Reading has deadlines of its own, which depend on what is read.
            timeout=httpx.Timeout(
                connect=connect, pool=connect, write=self._settings.body_timeout, read=None
            ),
            headers=_AGENT,
            trust_env=False,  # a proxy from the environment must not see prompts
            follow_redirects=False,
        )

    @property
    def name(self) -> str:
        """Host and port of the engine, as a metric label."""
        return httpx.URL(self._url).netloc.decode()

    async def send(self, path: str, body: bytes, headers: dict[str, str], deadline: float) -> EngineAnswer:
        """POST a body and wait for status and headers of the answer. Raises BackendError."""
        self.outstanding += 1
        try:
            response = await self._send(path, body, headers, deadline)
        except BaseException:
            self._done()
            raise
        return EngineAnswer(response, self._settings.idle_timeout, self._done)

    def _done(self) -> None:
        self.outstanding -= 1

    async def _send(self, path: str, body: bytes, headers: dict[str, str], deadline: float) -> httpx.Response:
        url = self._urls.get(path) or self._urls.setdefault(path, httpx.URL(self._url + path))
        request = httpx.Request("POST", url, headers=_HEADERS | headers, content=body)
        try:
            async with asyncio.timeout(deadline):
                return await self._transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise UnreachableError(f"the engine cannot be reached ({type(error).__name__})") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise TooSlowError("the engine did not answer in time") from error
        except httpx.HTTPError as error:
            raise BrokenError(f"the engine did not answer ({type(error).__name__})") from error

    async def status(self) -> EngineStatus:
        """Ask how the engine is, ready or not. Raises BackendError."""
        try:
            async with asyncio.timeout(self._settings.status_timeout):
                response = await self._status.get(STATUS_PATH)
        except TimeoutError as error:
            raise TooSlowError("the engine's status did not come in time") from error
        except httpx.HTTPError as error:
            raise UnreachableError(
                f"the engine's status cannot be asked for ({type(error).__name__})"
            ) from error
        if len(response.content) > _MAX_STATUS_BYTES:
            raise BrokenError("the engine's status is too long")
        try:
            status = EngineStatus.open(response.content, response.headers.get(STATUS_SEAL_HEADER), self._keys)
        except SealError as error:
            raise BrokenError(
                f"the engine's status is not signed with a key of this gateway ({error}); "
                "do both use the same key file?"
            ) from error
        except ValidationError as error:
            if response.status_code == 503:
                raise UnreachableError("the engine is starting") from error
            raise BrokenError(
                f"{STATUS_PATH} answered {response.status_code} with something that is not a guard status; "
                "is the server behind engine_url a guarded vLLM?"
            ) from error
        if (response.status_code == 200) != (status.state == "ready"):
            raise BrokenError(f"the engine's status is '{status.state}' with HTTP {response.status_code}")
        return status

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()
        await self._status.aclose()
