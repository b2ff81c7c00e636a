"""The proxies that the guard is compared with do what they stand for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from loadtests.alternatives.client import FailedError, Target, ask
from loadtests.alternatives.guard_model import digest, guard_model
from loadtests.alternatives.output_scan import output_scan
from loadtests.alternatives.proxy import CHAT, REFUSAL, Ask, application
from loadtests.alternatives.two_phase import two_phase

WORDS = [f"word{n} " for n in range(8)]
BENIGN, HARMFUL = "How do I bake bread?", "Something to refuse."
Start = Callable[[Ask], Awaitable[str]]


class Backend:
    """An engine, a guard model and a check-only route in one, which notes what happens in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.go = asyncio.Event()  # tokens after the first wait for it
        self.go.set()
        self.judge = asyncio.Event()  # and the guard's word for this
        self.judge.set()
        self.said = list(WORDS)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post(CHAT, self.chat)
        app.router.add_post("/v1/guard/check", self.check)
        return app

    async def check(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.events.append(f"check {request.headers['authorization']}")
        return web.json_response({"results": [{"flagged": body["messages"][-1]["content"] == HARMFUL}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["max_tokens"] == 1:
            self.events.append("guard asked")
            await self.judge.wait()
            self.events.append("guard said")
            return web.json_response({"choices": [{"message": {"content": "x"}}]})
        self.events.append("answer begun")
        if not body.get("stream"):
            return web.json_response({"choices": [{"message": {"content": "".join(self.said)}}]})
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        try:
            for index, word in enumerate(self.said):
                if index:
                    await self.go.wait()
                frame = {"choices": [{"index": 0, "delta": {"content": word}}]}
                await response.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.events.append("answer given up")
            raise
        return response


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    found = Backend()
    server = TestServer(found.application(), handler_cancellation=True)
    await server.start_server()
    found.url = str(server.make_url("")).rstrip("/")  # type: ignore[attr-defined]
    yield found
    found.go.set()
    found.judge.set()
    await server.close()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    servers: list[TestServer] = []

    async def started(answer: Ask) -> str:
        server = TestServer(application(answer))
        await server.start_server()
        servers.append(server)
        return str(server.make_url("")).rstrip("/")

    yield started
    for server in servers:
        await server.close()


@pytest.fixture
def labels(tmp_path: Path) -> str:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps([digest(HARMFUL)]))
    return str(file)


@pytest.fixture
def patterns(tmp_path: Path) -> str:
    file = tmp_path / "patterns.json"
    file.write_text(json.dumps(["word4 WORD5"]))
    return str(file)


async def asked(url: str, prompt: str) -> Any:
    async with ClientSession() as session:
        return await asyncio.wait_for(ask(session, Target("it", url, ()), prompt, 8), 10)


async def open_stream(session: ClientSession, url: str, prompt: str = BENIGN) -> Any:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 8,
        "stream": True,
    }
    return await asyncio.wait_for(session.post(url + CHAT, json=body), 10)


async def until(there: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not there():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class TestTwoPhases:
    async def test_the_prompt_is_checked_before_the_answer_begins(self, backend, start):
        url = await start(two_phase(backend.url, backend.url, "sk-x"))
        answer = await asked(url, BENIGN)
        assert (answer.refused, answer.text) == (False, "".join(WORDS))
        assert backend.events == ["check Bearer sk-x", "answer begun"]
        assert set(answer.stages) == {"check", "generate"}

    async def test_a_flagged_prompt_is_never_sent_on(self, backend, start):
        url = await start(two_phase(backend.url, backend.url, "sk-x"))
        answer = await asked(url, HARMFUL)
        assert (answer.refused, answer.text) == (True, REFUSAL)
        assert backend.events == ["check Bearer sk-x"]

    async def test_tokens_are_passed_on_as_they_come(self, backend, start):
        backend.go.clear()
        url = await start(two_phase(backend.url, backend.url, "sk-x"))
        async with ClientSession() as session, await open_stream(session, url) as answer:
            first = await asyncio.wait_for(answer.content.readline(), 10)
            assert WORDS[0] in first.decode()
            backend.go.set()
            rest = await asyncio.wait_for(answer.read(), 10)
        assert rest.rstrip().endswith(b"data: [DONE]")


class TestGuardModel:
    async def test_in_sequence_the_answer_waits_for_the_guard(self, backend, start, labels):
        url = await start(guard_model(backend.url, backend.url, labels, "a"))
        assert not (await asked(url, BENIGN)).refused
        assert backend.events == ["guard asked", "guard said", "answer begun"]
        backend.events.clear()
        assert (await asked(url, HARMFUL)).refused
        assert backend.events == ["guard asked", "guard said"]

    async def test_in_a_race_both_begin_and_no_token_is_shown_before_the_guard_has_spoken(
        self, backend, start, labels
    ):
        backend.judge.clear()
        url = await start(guard_model(backend.url, backend.url, labels, "a", race=True))
        async with ClientSession() as session:
            opening = asyncio.create_task(open_stream(session, url))
            await until(lambda: len(backend.events) == 2)
            assert sorted(backend.events) == ["answer begun", "guard asked"]
            await asyncio.sleep(0.1)
            assert not opening.done(), "not even the headers may come"
            backend.judge.set()
            async with await opening as answer:
                assert "word7" in (await asyncio.wait_for(answer.read(), 10)).decode()

    async def test_a_lost_race_ends_the_answer_at_the_engine(self, backend, start, labels):
        backend.go.clear()
        url = await start(guard_model(backend.url, backend.url, labels, "a", race=True))
        answer = await asked(url, HARMFUL)
        assert (answer.refused, answer.text) == (True, REFUSAL)
        await until(lambda: "answer given up" in backend.events or "answer begun" not in backend.events)


class TestScannedAnswers:
    async def test_nothing_is_shown_until_a_chunk_is_whole(self, backend, start, patterns):
        backend.go.clear()
        url = await start(output_scan(backend.url, patterns, 4))
        async with ClientSession() as session:
            opening = asyncio.create_task(open_stream(session, url))
            await until(lambda: backend.events == ["answer begun"])
            await asyncio.sleep(0.1)
            assert not opening.done()
            backend.go.set()
            async with await opening as answer:
                assert answer.headers["x-guard-action"] == "pass"
                assert "word7" in (await asyncio.wait_for(answer.read(), 10)).decode()

    @pytest.mark.parametrize("chunk", [3, 5, 8])
    async def test_a_pattern_is_found_wherever_chunks_end(self, backend, start, patterns, chunk):
        backend.said[4:6] = ["word4 ", "WORD5 "]
        answer = await asked(await start(output_scan(backend.url, patterns, chunk)), BENIGN)
        assert answer.refused
        assert answer.text.endswith(REFUSAL)
        assert "WORD5" not in answer.text

    async def test_a_clean_answer_is_whole(self, backend, start, patterns):
        answer = await asked(await start(output_scan(backend.url, patterns, 3)), BENIGN)
        assert (answer.refused, answer.text) == (False, "".join(WORDS))

    @pytest.mark.parametrize(("said", "refused"), [("word4 WORD5", True), ("word4 word5", False)])
    async def test_an_answer_without_stream_is_scanned_too(self, backend, start, patterns, said, refused):
        backend.said = [said]
        url = await start(output_scan(backend.url, patterns, 3))
        body = {"model": "m", "messages": [{"role": "user", "content": BENIGN}], "max_tokens": 8}
        async with ClientSession() as session, session.post(url + CHAT, json=body) as answer:
            shown = (await answer.json())["choices"][0]["message"]["content"]
        assert shown == (REFUSAL if refused else said)


class TestClient:
    async def test_the_clock_stops_at_the_first_text(self, backend):
        backend.go.clear()
        asyncio.get_running_loop().call_later(0.3, backend.go.set)
        backend.said.insert(0, "")  # a frame without text, as vLLM's first one
        answer = await asked(backend.url, BENIGN)
        assert 0.25 < answer.first <= answer.seconds

    async def test_an_error_that_is_no_refusal_ends_the_measurement(self, start):
        async def broken(_: Any) -> web.StreamResponse:
            return web.Response(status=503)

        url = await start(broken)
        with pytest.raises(FailedError, match="503"):
            await asked(url, BENIGN)
