"""Scanning the answer: a proxy holds back the stream until so many tokens have come, scans, and lets go.

    python -m loadtests.alternatives.output_scan PORT '{"generate": URL, "patterns": FILE, "chunk": 16}'

The scanner is one regular expression, which is as cheap as a scanner gets; the patterns are cut from the
model's own answers to the prompts that are to be refused, so that it never misses. A pattern may lie across
two chunks: the end of the last one is scanned again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import ClientResponse, web

from loadtests.alternatives.proxy import Ask, Exchange, refusal_frames, serve


def output_scan(generate: str, patterns: str, chunk: int = 16) -> Ask:
    """Scan the stream of ``generate`` every ``chunk`` tokens."""
    words = json.loads(Path(patterns).read_text())
    unsafe = re.compile("|".join(map(re.escape, words)) or r"(?!)")
    overlap = max(map(len, words), default=1) - 1

    async def answer(exchange: Exchange) -> web.StreamResponse:
        async with exchange.generate(generate) as upstream:
            if exchange.body.get("stream"):
                return await scanned(exchange, upstream)
            whole = await upstream.read()
            exchange.passed("generate")
            if unsafe.search(json.loads(whole)["choices"][0]["message"]["content"]):
                return await exchange.refuse()
            passed = exchange.headers("pass")
            return web.Response(body=whole, content_type=upstream.content_type, headers=passed)

    async def scanned(exchange: Exchange, upstream: ClientResponse) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        text = ""
        async for frames, said in chunks(exchange, upstream, chunk):
            text = text[max(0, len(text) - overlap) :] + said
            found = unsafe.search(text)
            exchange.passed("hold")
            if found and response is None:
                return await exchange.refuse()
            if response is None:
                response = web.StreamResponse(status=upstream.status, headers=exchange.headers("pass"))
                response.content_type = upstream.content_type
                await response.prepare(exchange.request)
            if found:
                await response.write(refusal_frames(exchange.body["model"]))
                break  # closes the connection, and vLLM stops
            await response.write(frames)
        assert response is not None
        await response.write_eof()
        return response

    return answer


async def chunks(exchange: Exchange, upstream: ClientResponse, size: int) -> AsyncIterator[tuple[bytes, str]]:
    """Lines of a stream with ``size`` tokens in them, and the text of these; the last has what is left."""
    held, said, count, begun = b"", "", 0, False
    async for line in upstream.content:
        held += line
        if not line.startswith(b"data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            if content := choice["delta"].get("content"):
                said, count = said + content, count + 1
                if not begun:
                    exchange.passed("generate")
                    begun = True
        if count >= size:
            yield held, said
            held, said, count = b"", "", 0
    if held:
        yield held, said


if __name__ == "__main__":
    serve(output_scan(**json.loads(sys.argv[2])), int(sys.argv[1]))
