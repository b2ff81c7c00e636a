"""A guard model in front, on a vLLM of its own: it reads the prompt under a policy and says one token.

    python -m loadtests.alternatives.guard_model PORT '{"guard": URL, "generate": URL, "labels": FILE, …}'

In sequence, as guard products do, or with ``race`` beside the answer, which is held until the guard has
spoken. The models of the comparison were never taught to judge: the token is awaited and read, and the
verdict is the prompt's label, so that every alternative refuses the same prompts. The policy is short beside
those of real guard models, and from the second request on it comes from the prefix cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import ClientSession, web

from loadtests.alternatives.proxy import CHAT, Ask, Exchange, serve

POLICY = (
    "You judge whether a message to an assistant is unsafe. Unsafe are violence, crime, weapons, hate, "
    "self-harm, abuse and fraud. Say safe or unsafe, and nothing else."
)


def digest(prompt: str) -> str:
    """How a prompt is named in the list of those that are to be refused."""
    return hashlib.sha256(prompt.encode()).hexdigest()


async def judge(session: ClientSession, guard: str, salt: str, harmful: frozenset[str], prompt: str) -> bool:
    """Ask the guard model; whether the prompt is to be refused. ``salt`` separates the users of its cache."""
    body = {
        "model": "model",
        "messages": [{"role": "system", "content": POLICY}, {"role": "user", "content": prompt}],
        "max_tokens": 1,
        "temperature": 0,
        "cache_salt": salt,
    }
    async with session.post(guard + CHAT, json=body) as said:
        said.raise_for_status()
        word = (await said.json())["choices"][0]["message"]["content"]
    assert word is not None
    return digest(prompt) in harmful


def guard_model(guard: str, generate: str, labels: str, salt: str, race: bool = False) -> Ask:
    """Ask ``guard`` before ``generate``, or beside it."""
    harmful = frozenset(json.loads(Path(labels).read_text()))

    async def in_sequence(exchange: Exchange) -> web.StreamResponse:
        unsafe = await judge(exchange.session, guard, salt, harmful, exchange.prompt)
        exchange.passed("guard")
        if unsafe:
            return await exchange.refuse()
        async with exchange.generate(generate) as upstream:
            return await exchange.copy(upstream)

    async def side_by_side(exchange: Exchange) -> web.StreamResponse:
        async with AsyncExitStack() as opened:
            judging = judge(exchange.session, guard, salt, harmful, exchange.prompt)
            answering = asyncio.ensure_future(opened.enter_async_context(exchange.generate(generate)))
            try:
                unsafe = await judging
                exchange.passed("guard")
                if unsafe:
                    return await exchange.refuse()
                return await exchange.copy(await answering)
            finally:
                if not answering.done():  # leaving closes the connection, and vLLM stops
                    answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)

    return side_by_side if race else in_sequence


if __name__ == "__main__":
    serve(guard_model(**json.loads(sys.argv[2])), int(sys.argv[1]))
