"""Traffic of many kinds, most of which end a request otherwise than by reading a whole answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

CHAT = "/v1/chat/completions"


@dataclass
class Traffic:
    """Clients of a gateway. ``counts`` is by kind and status, ``failed`` what should not have happened."""

    url: str
    model: str
    benign: list[str]
    harmful: list[str]
    keys: list[str]
    tokens: int = 24
    pause: float = 0.05
    """Mean seconds between a client's requests."""
    counts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float, clients: int, seed: int = 0) -> None:
        """Send requests for so long; returns when the last is over and all connections are closed."""
        until = time.monotonic() + seconds
        session = ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(60))
        async with session, asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(session, until, random.Random(f"{seed}-{number}")))

    async def _client(self, session: ClientSession, until: float, rng: random.Random) -> None:
        kinds: dict[str, tuple[int, Callable[[ClientSession, random.Random], Awaitable[int]]]] = {
            "whole": (6, self._whole),
            "stream": (6, self._stream),
            "refused": (3, self._refused),
            "check": (2, self._check),
            "left": (2, self._left),
            "gone": (2, self._gone),
            "slow": (1, self._slow),
            "malformed": (1, self._malformed),
            "stranger": (1, self._stranger),
        }
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        expected = {"malformed": 400, "stranger": 401 if self.keys else 200, "gone": 0}
        while time.monotonic() < until:
            (kind,) = rng.choices(names, weights)
            try:
                status = await kinds[kind][1](session, rng)
            except (ClientError, TimeoutError) as error:
                self.failed[f"{kind}: {type(error).__name__}"] += 1
                continue
            self.counts[f"{kind} {status or 'given up'}"] += 1
            if status != expected.get(kind, 200):
                self.failed[f"{kind}: {status}"] += 1
            await asyncio.sleep(rng.expovariate(1 / self.pause))

    def _request(self, rng: random.Random, prompts: list[str], **more: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {rng.choice(self.keys)}"} if self.keys else {}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": rng.choice(prompts)}],
            "max_tokens": self.tokens,
            "temperature": 0,
            **more,
        }
        return {"url": self.url + CHAT, "json": body, "headers": headers}

    async def _whole(self, session: ClientSession, rng: random.Random) -> int:
        async with session.post(**self._request(rng, self.benign)) as answer:
            await answer.read()
            return answer.status

    async def _stream(self, session: ClientSession, rng: random.Random) -> int:
        async with session.post(**self._request(rng, self.benign, stream=True)) as answer:
            await answer.read()
            return answer.status

    async def _refused(self, session: ClientSession, rng: random.Random) -> int:
        request = self._request(rng, self.harmful, stream=rng.random() < 0.5)
        async with session.post(**request) as answer:
            await answer.read()
            if answer.headers.get("x-guard-action") != "refuse":
                self.failed["refused: it was not"] += 1
            return answer.status

    async def _check(self, session: ClientSession, rng: random.Random) -> int:
        request = self._request(rng, self.benign + self.harmful)
        body = {"messages": request["json"]["messages"]}
        url = self.url + "/v1/guard/check"
        async with session.post(url, json=body, headers=request["headers"]) as answer:
            await answer.read()
            return answer.status

    async def _left(self, session: ClientSession, rng: random.Random) -> int:
        """Close the connection after the first bytes of a stream."""
        async with session.post(**self._request(rng, self.benign, stream=True)) as answer:
            await answer.content.readany()
            answer.close()
            return answer.status

    async def _gone(self, session: ClientSession, rng: random.Random) -> int:
        """Close the connection before there is an answer, most of the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * 0.02):
                async with session.post(**self._request(rng, self.benign)) as answer:
                    await answer.read()
        return 0

    async def _slow(self, session: ClientSession, rng: random.Random) -> int:
        async with session.post(**self._request(rng, self.benign, stream=True)) as answer:
            async for _ in answer.content:
                await asyncio.sleep(0.02)
            return answer.status

    async def _malformed(self, session: ClientSession, rng: random.Random) -> int:
        request = self._request(rng, self.benign)
        headers = request["headers"] | {"content-type": "application/json"}
        async with session.post(request["url"], data=b'{"model": ', headers=headers) as answer:
            await answer.read()
            return answer.status

    async def _stranger(self, session: ClientSession, rng: random.Random) -> int:
        request = self._request(rng, self.benign) | {"headers": {"authorization": "Bearer sk-nobody"}}
        async with session.post(**request) as answer:
            await answer.read()
            return answer.status
