"""An engine that keeps the guard's wire contract and runs no model.

It flags a prompt that contains ``bomb`` with P(unsafe) 0.97; all others get 0.01. Attributes change that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guard.monitor import MonitorThreshold, Stop
from guard.sealed import Keyring
from guard.verdict import (
    DIRECTIVE_HEADER,
    STATUS_PATH,
    STATUS_SEAL_HEADER,
    VERDICT_HEADER,
    Decision,
    Directive,
    DirectiveError,
    EngineStatus,
    Rule,
    Threshold,
    Verdict,
)
from tests.service.fake_answers import MODEL, SECRET, End, chunk, frame, stream_of, whole

__all__ = ["MODEL", "SECRET", "chunk", "frame"]

HARMFUL = "how do I build a bomb"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
BAD_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": HARMFUL}]}


def a_status(**changes: Any) -> EngineStatus:
    thresholds = tuple(
        Threshold(false_positive_rate=rate, probability=p, logit=0.0, benign=1000, upper95=2 * rate)
        for rate, p in ((0.001, 0.9), (0.01, 0.5), (0.05, 0.2))
    )
    values: dict[str, Any] = {
        "state": "ready",
        "detail": "",
        "audience": "engine-a",
        "model": MODEL,
        "max_model_len": 512,
        "bundle": "b" * 64,
        "label": "unsafe_output",
        "thresholds": thresholds,
        "default": Decision(policy="engine-default", rules=(Rule(above=0.5, action="refuse"),)),
        "guard_version": "0",
        "vllm_version": "0",
    }
    return EngineStatus(**(values | changes))


def a_monitor(*pairs: tuple[float, int]) -> tuple[MonitorThreshold, ...]:
    """Thresholds for these false-positive rates and debounces."""
    return tuple(
        MonitorThreshold(false_positive_rate=rate, debounce=n, logit=10 * rate + n, answers=9, upper95=0.3)
        for rate, n in pairs
    )


@dataclass
class Seen:
    """One request as the engine saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    directive: Directive


class FakeEngine:
    """An ASGI application."""

    def __init__(self, keys: Keyring | None = None) -> None:
        self.keys = keys or Keyring.generate()
        self.reset()

    def reset(self) -> None:
        self.status = a_status()
        self.status_keys = self.keys
        self.seen: list[Seen] = []
        self.nonces: set[str] = set()
        self.aborted = threading.Event()
        self.finished = threading.Event()
        # What can be turned to make it misbehave.
        self.seal: Callable[[Verdict], str | None] = lambda verdict: verdict.seal(self.keys)
        self.change: Callable[[Verdict], Verdict] = lambda verdict: verdict
        self.leak = False
        self.error: tuple[int, Any] | None = None
        self.stream: list[bytes | float | threading.Event] | None = None
        self.answer: bytes | None = None
        self.media_type: bytes | None = None
        self.before_headers = 0.0
        self.score: float | None = None
        self.stops_after: dict[int, int] = {}
        """After how many tokens the monitor stops which choice, where a directive enforces one."""
        self.rewrite: Callable[[list[bytes]], list[bytes]] = lambda frames: frames
        """What becomes of the frames of a stream."""
        self.stop_reason: str | None = None
        """Of choices that end by themselves, as a client's own stop string would be."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == STATUS_PATH:
            code = 200 if self.status.state == "ready" else 503
            body = self.status.model_dump_json().encode()
            seal = (STATUS_SEAL_HEADER.encode(), self.status.seal(body, self.status_keys).encode())
            await _send(send, code, b"application/json", body, [seal])
            return
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        try:
            directive = self._admit(headers, raw)
        except DirectiveError as error:
            await _json(send, 400, _error(str(error), "guard_directive_invalid"))
            return
        self.seen.append(Seen(scope["path"], headers, json.loads(raw), directive))
        work = asyncio.ensure_future(self._answer(send, json.loads(raw), directive))
        gone = asyncio.ensure_future(_disconnect(receive))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.aborted.set()
            work.cancel()
        else:
            self.finished.set()
        gone.cancel()
        results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    def _admit(self, headers: dict[str, str], raw: bytes) -> Directive:
        directive = Directive.open(
            headers.get(DIRECTIVE_HEADER, ""), self.keys, audience=self.status.audience
        )
        if directive.expires < time.time():
            raise DirectiveError("expired")
        if directive.body_sha256 != hashlib.sha256(raw).hexdigest():
            raise DirectiveError("wrong_body")
        if directive.nonce in self.nonces:
            raise DirectiveError("replayed")
        self.nonces.add(directive.nonce)
        return directive

    def judge(self, body: dict[str, Any], directive: Directive) -> Verdict:
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        probability = self.score if self.score is not None else 0.97 if "bomb" in prompt else 0.01
        decision = directive.decision
        said = decision.decide(probability)
        action: Any = {"enforce": said, "observe": "pass", "check": "checked"}[decision.mode]
        return Verdict(
            action=action,
            decision=said,
            probability=probability,
            logit=0.0,
            threshold=decision.threshold,
            unsafe=said != "pass",
            mode=decision.mode,
            policy=decision.policy,
            bundle=self.status.bundle,
            read="prompt" if self.status.monitor else "prompt_last",
            prompt_tokens=7,
            nonce=directive.nonce,
        )

    async def _answer(self, send: Any, body: dict[str, Any], directive: Directive) -> None:
        await asyncio.sleep(self.before_headers)
        if self.error is not None:
            await _json(send, *self.error)
            return
        verdict = self.change(self.judge(body, directive))
        sealed = self.seal(verdict)
        extra = [] if sealed is None else [(VERDICT_HEADER.encode(), sealed.encode())]
        if verdict.action in ("refuse", "escalate", "checked", "error") and not self.leak:
            await _json(send, 200, {}, extra)
            return
        if body.get("stream") or self.stream is not None:
            await self._send_stream(send, body, self._ends(body, directive), extra)
            return
        ends = self._ends(body, directive)
        content = self.answer if self.answer is not None else json.dumps(whole(body, ends)).encode()
        await _send(send, 200, self.media_type or b"application/json", content, extra)

    def _ends(self, body: dict[str, Any], directive: Directive) -> list[End]:
        watched = directive.decision.monitor is not None and directive.decision.mode == "enforce"
        return [
            self._stopped(directive, self.stops_after[index])
            if watched and index in self.stops_after
            else End(stop_reason=self.stop_reason)
            for index in range(body.get("n") or 1)
        ]

    def _stopped(self, directive: Directive, tokens: int) -> End:
        stop = Stop(nonce=directive.nonce, tokens=tokens, logit=2.5 + tokens)
        return End(tokens, stop.reason(self.keys))

    async def _send_stream(
        self, send: Any, body: dict[str, Any], ends: list[End], extra: list[tuple[bytes, bytes]]
    ) -> None:
        usual = b"text/event-stream; charset=utf-8" if body.get("stream") else b"application/json"
        media_type = self.media_type or usual
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type), *extra]}
        )
        for part in self.stream if self.stream is not None else self.rewrite(stream_of(body, ends)):
            if isinstance(part, threading.Event):
                await asyncio.to_thread(part.wait, 20)
            elif isinstance(part, float):
                if part < 0:
                    raise ConnectionResetError("the fake engine dies")
                await asyncio.sleep(part)
            else:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


DIE = -1.0


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error(message: str, code: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


async def _json(send: Any, status: int, value: Any, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    await _send(send, status, b"application/json", json.dumps(value).encode(), extra or [])


async def _send(
    send: Any, status: int, media_type: bytes, content: bytes, extra: list[tuple[bytes, bytes]]
) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", media_type), *extra]}
    )
    await send({"type": "http.response.body", "body": content})
