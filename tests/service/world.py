"""A small world for the gateway: ways to run it in front of a fake engine, without sockets and with them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.app import create_app
from service.engine import EngineWatch
from service.settings import Settings
from tests.service.fake_engine import FakeEngine


@dataclass
class World:
    """A running gateway in front of a fake engine, without sockets."""

    engine: FakeEngine
    client: httpx.AsyncClient
    registry: CollectorRegistry
    app: FastAPI

    @property
    def watch(self) -> EngineWatch:
        """The gateway's view of its (first) engine."""
        watch: EngineWatch = self.app.state.gateway.pool.watches[0]
        return watch

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def total(self, name: str) -> float:
        return sum(
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        )


def settings_for(engine: FakeEngine, folder: Path, policy: str | None = None, **changes: Any) -> Settings:
    key_file = folder / "keys"
    key_file.unlink(missing_ok=True)
    engine.keys.save(key_file)
    if policy is not None:
        changes["policy_file"] = folder / "policy.yaml"
        (folder / "policy.yaml").write_text(policy)
    return Settings(**({"key_file": key_file, "status_interval": 0.05} | changes))


@contextlib.asynccontextmanager
async def world(
    folder: Path,
    policy: str | None = None,
    *,
    ready: bool = True,
    engine: FakeEngine | None = None,
    judge: httpx.AsyncBaseTransport | None = None,
    network: httpx.AsyncBaseTransport | None = None,
    **changes: Any,
) -> AsyncIterator[World]:
    engine = engine or FakeEngine()
    registry = CollectorRegistry()
    app = create_app(
        settings_for(engine, folder, policy, **changes),
        transport=network or httpx.ASGITransport(engine),
        judge_transport=judge,
        registry=registry,
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        if ready:
            await eventually(lambda: app.state.gateway.pool.ready)
        yield World(engine, client, registry, app)


@contextlib.contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """Run an ASGI application under uvicorn in a thread; yields its URL."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    lifespan = "off" if isinstance(app, FakeEngine) else "on"
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan=lifespan, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


@dataclass
class Live:
    """A gateway and a fake engine behind real sockets."""

    url: str
    engine: FakeEngine
    app: FastAPI
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)


@contextlib.contextmanager
def live(
    folder: Path, policy: str | None = None, *, engine: FakeEngine | None = None, **changes: Any
) -> Iterator[Live]:
    engine = engine or FakeEngine()
    registry = CollectorRegistry()
    with serving(engine) as engine_url:
        app = create_app(
            settings_for(engine, folder, policy, engine_url=engine_url, **changes), registry=registry
        )
        with serving(app) as url:
            while httpx.get(url + "/readyz").status_code != 200:
                time.sleep(0.02)
            yield Live(url, engine, app, registry)


async def eventually(check: Callable[[], Awaitable[bool]] | Callable[[], bool], within: float = 5.0) -> None:
    """Wait until ``check`` holds."""
    async with asyncio.timeout(within):
        while True:
            result = check()
            if (await result) if isinstance(result, Awaitable) else result:
                return
            await asyncio.sleep(0.01)
