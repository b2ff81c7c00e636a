"""``neuronguard gateway``, ``python -m service``: run the gateway until it is told to stop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server

from service.app import create_app
from service.connection import bounded
from service.errors import ConfigError
from service.logs import set_up
from service.settings import Settings, load_settings


def main(config: Path | None = None, *, check: bool = False) -> int:
    """Return the exit status: 2 when the configuration is at fault, which one sentence on stderr explains.

    ``check``: build the gateway, say what it would do, and do not serve.
    """
    try:
        settings = load_settings(config)
        app = create_app(settings)
        if check:
            sys.stdout.write(_summary(settings, app))
            return 0
        set_up(settings)
        with _metrics_server(settings, app):
            _serve(settings, app)
    except ConfigError as error:
        sys.stderr.write(f"neuronguard: {error}\n")
        return 2
    return 0


def _summary(settings: Settings, app: FastAPI) -> str:
    policies = app.state.gateway.store.current
    modes = ", ".join(f"{name} ({policy.mode})" for name, policy in policies.policies.items())
    rated = any(policy.needs_bundle for policy in policies.policies.values())
    lines = [
        f"listens on  {settings.host}:{settings.port}",
        f"engines     {', '.join(settings.engines)}",
        f"policies    {modes}",
        f"keys        {len(policies.keys) or 'none: loopback only'}",
    ]
    if policies.judges:
        lines.append(f"judges      {', '.join(policies.judges)}")
    if settings.test_string:
        lines.append("test string is on: whoever sends it is refused")
    if rated:
        lines.append("            rules by fpr are checked once an engine has told its bundle's thresholds")
    return "\n".join([*lines, "the configuration is valid", ""])


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
        http=bounded(settings),
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


@click.command("gateway")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file with settings; environment variables come before it.",
)
@click.option(
    "--check-config", is_flag=True, help="Say whether settings, policies and keys are valid, and end."
)
def gateway(config: Path | None, check_config: bool) -> None:
    """Run the gateway in front of guarded engines until it is told to stop."""
    sys.exit(main(config, check=check_config))


if __name__ == "__main__":
    gateway(prog_name="python -m service")
