"""An engine that answers at once under the guard's contract: ``python -m loadtests.gateway.mock PORT KEYS``

Without a directive it answers as any OpenAI-compatible server would, so that clients and other proxies can
use it directly. A streamed answer has ``max_tokens`` chunks, ``seed`` milliseconds apart. It is also a
guardrail for LiteLLM that finds nothing. HTTP is parsed by hand, as little of it as these clients need.
"""

from __future__ import annotations

import asyncio
import json
import sys

from guard.sealed import Keyring
from guard.verdict import (
    DIRECTIVE_HEADER,
    STATUS_PATH,
    STATUS_SEAL_HEADER,
    VERDICT_HEADER,
    Decision,
    Directive,
    EngineStatus,
    Rule,
    Verdict,
)

MODEL = "mock"
AUDIENCE = "mock"
BUNDLE = "b" * 64
STATUS = EngineStatus(
    state="ready",
    detail="",
    audience=AUDIENCE,
    model=MODEL,
    max_model_len=4096,
    bundle=BUNDLE,
    label="unsafe_output",
    thresholds=(),
    default=Decision(policy="engine-default", rules=(Rule(above=0.5, action="refuse"),)),
    guard_version="0",
    vllm_version="0",
)
TEXT = "All is well and there is nothing to add to that. " * 8
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 88, "total_tokens": 95},
    }
).encode()
CHUNK = (
    b"data: %b\n\n"
    % json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "delta": {"content": " well"}, "finish_reason": None}],
        }
    ).encode()
)
LAST = CHUNK.replace(b'"finish_reason": null', b'"finish_reason": "stop"')


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, keys: Keyring) -> None:
        self._keys = keys
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if self._streaming is not None:
            self._streaming.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._data += data
        while True:
            head, end, rest = self._data.partition(b"\r\n\r\n")
            if not end:
                return
            lines = head.decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])
            }
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            self._data = rest[length:]
            self._answer(lines[0].split()[1].partition("?")[0], headers, rest[:length])

    def _answer(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if path == STATUS_PATH:
            status = STATUS.model_dump_json().encode()
            self._send(status, (STATUS_SEAL_HEADER, EngineStatus.seal(status, self._keys)))
        elif path.endswith("litellm_basic_guardrail_api"):
            self._send(b'{"action": "NONE"}')
        elif path.endswith("/chat/completions"):
            sealed = headers.get(DIRECTIVE_HEADER)
            extra = [(VERDICT_HEADER, self._verdict(sealed))] if sealed else []
            if b'"stream":true' in body.replace(b" ", b""):
                self._streaming = asyncio.ensure_future(self._stream(json.loads(body), *extra))
            else:
                self._send(ANSWER, *extra)
        else:
            self._send(b'{"object": "list", "data": []}')

    def _verdict(self, sealed: str) -> str:
        directive = Directive.open(sealed, self._keys, audience=AUDIENCE)
        return Verdict(
            action="pass",
            decision="pass",
            probability=0.01,
            logit=-4.6,
            threshold=0.5,
            unsafe=False,
            mode=directive.decision.mode,
            policy=directive.decision.policy,
            bundle=BUNDLE,
            read="prompt_last",
            prompt_tokens=7,
            nonce=directive.nonce,
        ).seal(self._keys)

    def _send(self, body: bytes, *extra: tuple[str, str]) -> None:
        more = "".join(f"{name}: {value}\r\n" for name, value in extra)
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
        )
        self._write(head.encode() + body)

    async def _stream(self, body: dict[str, int], *extra: tuple[str, str]) -> None:
        more = "".join(f"{name}: {value}\r\n" for name, value in extra)
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n{more}\r\n"
        )
        self._write(head.encode())
        pause = body.get("seed", 0) / 1000
        for index in range(body["max_tokens"]):
            if pause:
                await asyncio.sleep(pause)
            chunk = CHUNK if index + 1 < body["max_tokens"] else LAST + b"data: [DONE]\n\n"
            self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self._write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _head(media_type: str, more: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\n{more}\r\n".encode()


async def main(port: int, keys: Keyring) -> None:
    """Serve until stopped."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(keys), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Keyring.load(sys.argv[2])))
