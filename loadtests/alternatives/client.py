"""The client of the comparison: streamed chat requests, timed to the first byte that says something."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiohttp import ClientSession

from loadtests.alternatives.proxy import CHAT, REFUSAL


@dataclass(frozen=True)
class Target:
    """One alternative as a client sees it, and the groups of processes that it consists of."""

    name: str
    url: str
    groups: tuple[str, ...]
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the body."""
    model: str = "model"
    refuses: bool = True
    """Whether it is to refuse what is harmful; stock vLLM is not."""


class Answer(NamedTuple):
    """What came of a request; times in seconds from sending it."""

    first: float
    """To the first text of the answer, or to the refusal."""
    seconds: float
    """To its end."""
    refused: bool
    text: str
    stages: dict[str, float]
    """Milliseconds, as the answer's header says."""


class FailedError(Exception):
    """A server answered with an error that is no refusal."""


async def ask(session: ClientSession, target: Target, prompt: str, max_tokens: int) -> Answer:
    """Send one request and read its answer to the end. Raises FailedError."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    } | target.extra
    first, parts = 0.0, []
    began = time.perf_counter()
    async with session.post(target.url + CHAT, json=body, headers=target.headers) as answer:
        if answer.status not in (200, 400, 403):
            raise FailedError(f"{target.name}: {answer.status} {(await answer.text())[:300]}")
        async for line in answer.content:
            text = _text(line) if answer.status == 200 else line.decode()
            if text:
                first = first or time.perf_counter() - began
                parts.append(text)
        seconds = time.perf_counter() - began
        said = "".join(parts)
        refused = answer.status != 200 or said.startswith(REFUSAL) or said.endswith(REFUSAL)
        refused |= answer.headers.get("x-guard-action") == "refuse"
        if not said:
            raise FailedError(f"{target.name}: an answer without text")
        return Answer(first, seconds, refused, said, _stages(answer.headers))


async def ask_all(
    session: ClientSession, target: Target, prompts: list[str], max_tokens: int, at_once: int
) -> list[Answer]:
    """Several requests, ``at_once`` of them at one time, each slot sending the next when it is free."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(prompts))

    async def slot() -> None:
        for index, prompt in waiting:
            answers[index] = await ask(session, target, prompt, max_tokens)

    await asyncio.gather(*(slot() for _ in range(at_once)))
    return [answers[index] for index in sorted(answers)]


def _text(line: bytes) -> str:
    if not line.startswith(b"data: {"):
        return ""
    frame = json.loads(line[6:])
    if "error" in frame:  # an error once the stream has begun
        return str(frame["error"])
    return "".join(choice["delta"].get("content") or "" for choice in frame["choices"])


def _stages(headers: Any) -> dict[str, float]:
    """``server-timing`` (W3C): ``name;dur=milliseconds``, with commas between."""
    found = re.findall(r"([\w-]+);dur=([\d.]+)", headers.get("server-timing", ""))
    return {name: float(ms) for name, ms in found}
