"""Load on one server: ``python -m loadtests.gateway.load URL '{"requests": 100, …}'`` prints what it found.

Answers are read as bytes and not parsed, so that the client costs little beside what it measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np

BODY = {"model": "mock", "messages": [{"role": "user", "content": "How do I bake bread at home? " * 8}]}


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """One request whose answer is not streamed; returns its status."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length"))
    await reader.readexactly(length)
    return int(lines[0].split()[1])


async def whole(url: str, connections: int, requests: int) -> dict[str, Any]:
    """Requests over kept connections, each sending the next one as soon as the last is answered."""
    request, seconds, left = _request(url, BODY), [], [requests]
    failed = 0

    async def client() -> None:
        nonlocal failed
        reader, writer = await _connect(url)
        while left[0] > 0:
            left[0] -= 1
            started = time.perf_counter()
            failed += await exchange(reader, writer, request) != 200
            seconds.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(connections)))
    return _summary(seconds, failed) | {"wall_seconds": time.perf_counter() - started}


async def streams(url: str, count: int, chunks: int, pause_ms: int) -> dict[str, Any]:
    """Streams at one time. A gap is the time between two arrivals of bytes in one stream."""
    body = BODY | {"stream": True, "max_tokens": chunks, "seed": pause_ms}
    request, first, gaps, failed = _request(url, body), [], [], 0

    async def client(delay: float) -> None:
        nonlocal failed
        await asyncio.sleep(delay)
        reader, writer = await _connect(url)
        started = time.perf_counter()
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        tail, last = b"", 0.0
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(65536)
            if not data:
                break
            now = time.perf_counter()
            if last:
                gaps.append(now - last)
            else:
                first.append(now - started)
            last, tail = now, (tail + data)[-64:]
        failed += b"[DONE]" not in tail
        writer.close()

    spread = pause_ms / 1000  # so that chunks do not all fall together
    await asyncio.gather(*(client(spread * index / count) for index in range(count)))
    return _summary(gaps, failed) | {"first_p99": float(np.quantile(first, 0.99)), "streams": count}


def _summary(seconds: list[float], failed: int) -> dict[str, Any]:
    p50, p99 = (float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    return {"count": len(seconds), "failed": failed, "p50": p50, "p99": p99, "max": max(seconds)}


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


def _request(url: str, body: dict[str, Any]) -> bytes:
    parts, content = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST {parts.path or '/v1/chat/completions'} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
        "authorization: Bearer sk-bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def main(url: str, wish: dict[str, int]) -> dict[str, Any]:
    """What was asked for."""
    if "streams" in wish:
        return await streams(url, wish["streams"], wish["chunks"], wish["pause_ms"])
    return await whole(url, wish["connections"], wish["requests"])


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))))
