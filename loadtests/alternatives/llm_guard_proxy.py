"""LLM Guard in front: its scanner of banned substrings, the only kind that finds anything without weights.

    PYTHON_OF_LLM_GUARD -m loadtests.alternatives.llm_guard_proxy PORT '{"generate": URL, "banned": FILE}'

The substrings are the prompts that are to be refused. What a scanner with a model costs is not shown by this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aiohttp import web

from loadtests.alternatives.proxy import Ask, Exchange, serve


def llm_guard(generate: str, banned: str) -> Ask:
    """Scan the prompt, then ask ``generate``."""
    from llm_guard.input_scanners import BanSubstrings

    scanner = BanSubstrings(json.loads(Path(banned).read_text()))

    async def answer(exchange: Exchange) -> web.StreamResponse:
        _, valid, _ = scanner.scan(exchange.prompt)
        exchange.passed("scan")
        if not valid:
            return await exchange.refuse()
        async with exchange.generate(generate) as upstream:
            return await exchange.copy(upstream)

    return answer


if __name__ == "__main__":
    serve(llm_guard(**json.loads(sys.argv[2])), int(sys.argv[1]))
