"""The measurement of several engines: what a round says of servers of known speed, and what the page says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtests.scale import load, report
from loadtests.scale.servers import LAYOUTS, Servers

WAIT = 0.05
"""Seconds before a fake server's first token."""


class Fake:
    """Streams as many tokens as were asked for, less ``short``, one request at a time."""

    def __init__(self, short: int = 0) -> None:
        self.prompts: list[list[int]] = []
        self._short = short
        self._turn = asyncio.Lock()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.prompts.append(body["prompt"])
        async with self._turn:
            await asyncio.sleep(WAIT)
        usage = {"completion_tokens": body["max_tokens"] - self._short}
        frames = ({"choices": [{"text": "x"}]}, {"choices": [], "usage": usage})
        return web.Response(text="".join(f"data: {json.dumps(frame)}\n\n" for frame in frames))


@asynccontextmanager
async def serving(*fakes: Fake) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as running:
        urls = []
        for fake in fakes:
            app = web.Application()
            app.router.add_post("/v1/completions", fake.answer)
            server = await running.enter_async_context(TestServer(app))
            urls.append(str(server.make_url("")).rstrip("/"))
        yield Servers(urls, [SimpleNamespace(pid=os.getpid())])  # type: ignore[list-item]


async def test_a_round_measures_what_a_server_of_known_speed_does() -> None:
    fake = Fake()
    async with serving(fake) as servers:
        found = await load.measure(servers, 3)
    assert sorted(fake.prompts) == sorted(load.prompts(3))
    fastest = 1 / WAIT  # a busy machine is slower
    assert fastest / 5 < found["requests_per_second"] <= fastest
    assert found["output_tokens_per_second"] == pytest.approx(load.ANSWER * found["requests_per_second"])
    assert load.LENGTH[0] * fastest / 5 < found["prefill_tokens_per_second"] < load.LENGTH[1] * fastest
    assert WAIT <= found["first_token_alone_seconds"] < found["first_token_seconds"]
    assert found["cpu_seconds_per_request"] > 0


async def test_replicas_are_asked_in_turn() -> None:
    fakes = Fake(), Fake()
    async with serving(*fakes) as servers:
        found = await load.measure(servers, 0)
    assert found["requests_per_second"] <= 2 / WAIT
    assert [len(fake.prompts) for fake in fakes] == [load.REQUESTS + load.ALONE, load.REQUESTS]


async def test_an_answer_that_was_cut_short_ends_the_measurement() -> None:
    async with serving(Fake(short=1)) as servers:
        with pytest.raises(RuntimeError, match="and not by 16 tokens"):
            await load.measure(servers, 0)


def test_page_compares_on_with_off_and_with_one_engine(tmp_path: Path) -> None:
    def rounds(value: float) -> list[dict[str, float]]:
        return [dict.fromkeys(report.FIGURES, value)] * 3

    layouts: dict[str, Any] = {name: {"off": rounds(4.0), "on": rounds(3.0)} for name in LAYOUTS}
    layouts["replicas"] = {"off": rounds(8.0), "on": rounds(6.0)}
    machine = {"python": "3.11.7", "vllm": "0.32.0", "commit": "abc"}
    page = report.page({"layouts": layouts, "rounds": 3, "cores": 2, "machine": machine})
    assert "| one engine | 4.00 | 3.00 | 0.750 [0.750, 0.750] | 1.00 |" in page
    assert "| two replicas | 8.00 | 6.00 | 0.750 [0.750, 0.750] | 2.00 |" in page
    report.picture(layouts, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_layouts_follow_one_another_in_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loadtests.scale import __main__ as command

    keys = []

    @contextmanager
    def running(layout: object, model: Path, bundle: Path, key_file: Path, logs: Path) -> Iterator[Any]:
        keys.append(key_file.read_text())
        yield {"off": "off", "on": "on"}

    async def measured(server: str, round_: int) -> dict[str, float]:
        return {"round": round_}

    monkeypatch.setattr(command, "running", running)
    monkeypatch.setattr(command, "measure", measured)
    for name in ("one", "replicas"):
        found = command.run(name, tmp_path, tmp_path, tmp_path, 2)
        assert found == {way: [{"round": 0}, {"round": 1}] for way in ("off", "on")}
    assert len(set(keys)) == 2
