"""``python -m service``: run the gateway until it is told to stop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server

from service.app import create_app
from service.errors import ConfigError
from service.logs import set_up
from service.settings import Settings, load_settings


def main() -> int:
    """Return the exit status: 2 when the configuration is at fault, which one sentence on stderr explains."""
    try:
        settings = load_settings()
        app = create_app(settings)
        set_up(settings)
        with _metrics_server(settings, app):
            _serve(settings, app)
    except ConfigError as error:
        sys.stderr.write(f"neuronguard: {error}\n")
        return 2
    return 0


class _Server(uvicorn.Server):
    """Says at ``/readyz`` that it will stop before it does, so that a load balancer looks elsewhere."""

    def __init__(self, config: uvicorn.Config, draining: asyncio.Event, delay: float) -> None:
        super().__init__(config)
        self._draining = draining
        self._delay = delay

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts the delay, the second ends it, a third interrupts running answers."""
        if self._delay and not self._draining.is_set():
            self._draining.set()
            loop, stop = asyncio.get_running_loop(), super().handle_exit
            loop.call_soon_threadsafe(loop.call_later, self._delay, stop, sig, frame)
        else:
            self._draining.set()
            super().handle_exit(sig, frame)


def _serve(settings: Settings, app: FastAPI) -> None:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # the audit log says more, and never a query string
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    _Server(config, app.state.gateway.draining, settings.drain_delay).run()


@contextmanager
def _metrics_server(settings: Settings, app: FastAPI) -> Iterator[None]:
    """Metrics on their own port, if one is set: still there while the last answers are given."""
    if settings.metrics_port is None:
        yield
        return
    registry = app.state.gateway.metrics.registry
    try:
        server, thread = start_http_server(settings.metrics_port, addr=settings.host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"The metrics cannot be served on {settings.host}:{settings.metrics_port}: {error}."
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
