"""A server that answers status requests as an engine does, and all others with whatever bytes it is told."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from guard.sealed import Keyring
from guard.verdict import DIRECTIVE_HEADER, STATUS_PATH, STATUS_SEAL_HEADER, VERDICT_HEADER, Directive
from tests.service.fake_engine import FakeEngine

Step = bytes | float | Literal["reset"]
"""Bytes to send, seconds to wait, or a connection to break off without an orderly end."""
Script = Callable[[str], list[Step]]
"""From the header line of a true verdict to what is sent. Afterwards the connection is closed."""


class RawEngine:
    """Runs in a thread of its own."""

    def __init__(self, keys: Keyring) -> None:
        self._fake = FakeEngine(keys)
        self.script: Script = lambda verdict: []
        self.keep = False
        """Leave the connection open behind the script, for the next request."""
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if lines[0].split()[1] == STATUS_PATH:
            status = self._fake.status.model_dump_json().encode()
            seal = f"{STATUS_SEAL_HEADER}: {self._fake.status.seal(status, self._fake.keys)}"
            writer.write(whole_answer(status, seal))
            await writer.drain()
            return True
        self.asked += 1
        directive = Directive.open(headers[DIRECTIVE_HEADER], self._fake.keys, audience="engine-a")
        verdict = self._fake.judge(json.loads(body), directive).seal(self._fake.keys)
        for step in self.script(f"{VERDICT_HEADER}: {verdict}"):
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif step == "reset":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return False
            else:
                await asyncio.sleep(step)
        return self.keep


def whole_answer(body: bytes, *headers: str) -> bytes:
    """An HTTP answer in one piece."""
    lines = ("HTTP/1.1 200 OK", "content-type: application/json", f"content-length: {len(body)}", *headers)
    return "\r\n".join((*lines, "", "")).encode() + body


@contextmanager
def raw_engine(keys: Keyring) -> Iterator[tuple[str, RawEngine]]:
    """Run one; yields its URL."""
    engine = RawEngine(keys)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(engine.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", engine
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
