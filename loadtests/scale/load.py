"""One round of load on one set of servers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import httpx

from loadtests.scale.servers import Servers

REQUESTS = 12
AT_ONCE = 6
ANSWER = 16
"""Tokens of each answer in the mixed part."""
ALONE = 4
"""Requests one after another."""
LENGTH = (64, 192)
VOCABULARY = 256


def prompts(round_: int) -> list[list[int]]:
    """Random prompts, the same for every server of a round and different in every round."""
    rng = random.Random(round_)
    count = 2 * REQUESTS + ALONE
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(*LENGTH))] for _ in range(count)]


async def measure(servers: Servers, round_: int) -> dict[str, float]:
    """Requests with answers, then prompts alone, then requests one by one.

    CPU seconds are those of the first two parts by request.
    """
    work = prompts(round_)
    mixed, alone = work[:REQUESTS], work[2 * REQUESTS :]
    prefill = work[REQUESTS : 2 * REQUESTS]
    async with httpx.AsyncClient(timeout=120.0) as client:
        began = servers.cpu()
        answered = await _at_once(client, servers.urls, mixed, ANSWER)
        read = await _at_once(client, servers.urls, prefill, 1)
        used = servers.cpu() - began
        single = [await _first_token(client, servers.urls[0], prompt, 1) for prompt in alone]
    return {
        "requests_per_second": REQUESTS / answered["seconds"],
        "output_tokens_per_second": REQUESTS * ANSWER / answered["seconds"],
        "first_token_seconds": median(answered["first"]),
        "prefill_tokens_per_second": sum(map(len, prefill)) / read["seconds"],
        "first_token_alone_seconds": median(single),
        "cpu_seconds_per_request": used / (2 * REQUESTS),
    }


async def _at_once(
    client: httpx.AsyncClient, urls: Sequence[str], work: Sequence[list[int]], tokens: int
) -> dict[str, Any]:
    """All of ``work``, ``AT_ONCE`` requests at a time, the URLs in turn."""
    waiting, first = list(enumerate(work)), []

    async def one() -> None:
        while waiting:
            index, prompt = waiting.pop(0)
            first.append(await _first_token(client, urls[index % len(urls)], prompt, tokens))

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return {"seconds": time.perf_counter() - began, "first": first}


async def _first_token(client: httpx.AsyncClient, url: str, prompt: list[int], tokens: int) -> float:
    """Seconds to the first token of one streamed request, which is read to its end."""
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    began, first, last = time.perf_counter(), 0.0, ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                last = line
    usage = json.loads(last.removeprefix("data: ")).get("usage") or {}
    if usage.get("completion_tokens") != tokens:
        raise RuntimeError(f"a request at {url} was answered by {usage} and not by {tokens} tokens")
    return first
