"""A gateway in two phases: have the prompt scored, wait, then have it answered.

    python -m loadtests.alternatives.two_phase PORT '{"check": URL, "check_key": KEY, "generate": URL, …}'

The score comes from a guarded engine's check-only route, so that the prompt is prefilled twice: by another
engine, or by the same one, whose prefix cache then has most of it.
"""

from __future__ import annotations

import json
import sys

from aiohttp import web

from loadtests.alternatives.proxy import Ask, Exchange, serve


def two_phase(check: str, generate: str, check_key: str, generate_key: str | None = None) -> Ask:
    """Ask ``check``, a gateway, and then ``generate``, anything that speaks the OpenAI API."""
    asking = {"authorization": f"Bearer {check_key}"}
    sending = {"authorization": f"Bearer {generate_key}"} if generate_key else {}

    async def answer(exchange: Exchange) -> web.StreamResponse:
        body = {"messages": exchange.body["messages"]}
        async with exchange.session.post(check + "/v1/guard/check", json=body, headers=asking) as checked:
            checked.raise_for_status()
            flagged = (await checked.json())["results"][0]["flagged"]
        exchange.passed("check")
        if flagged:
            return await exchange.refuse()
        async with exchange.generate(generate, **sending) as upstream:
            return await exchange.copy(upstream)

    return answer


if __name__ == "__main__":
    serve(two_phase(**json.loads(sys.argv[2])), int(sys.argv[1]))
