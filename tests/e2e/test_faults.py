"""What faults of a real engine look like to a client: too small a pool, a hang, processes that are killed.

One engine for nearly all of them, on a copy of the bundle, with few blocks and its worker in a process of
its own. The tests run in their order: one ends it by its worker, and the next two start others in its place
and end these by their engine core and by their API server. `test_parallel_server.py` kills one of several
engine cores.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import httpx
import pytest

from guard.bundle import ARRAY_FILE, Bundle, BundleError
from guard.engine.config import GuardConfig
from guard.engine.errors import GuardStartupError
from guard.verdict import EngineStatus
from service.app import create_app
from service.settings import Settings
from tests.e2e import servers
from tests.e2e.test_stack import metric
from tests.engine import world
from tests.service.processes import GatewayProcess, gateway_process
from tests.service.world import eventually

BLOCKS = 40
"""Of 32 tokens: not even three requests of full length fit at one time."""
APART = ("--distributed-executor-backend", "mp")
"""The worker is a process of its own."""
TEXTS = "/v1/completions"
STAGES = ("stream", "backend")


@dataclass(frozen=True)
class Doomed:
    """The engine and the gateway in front of it."""

    engine: str
    child: Popen[bytes]
    bundle: Path
    gateway: GatewayProcess

    def ask(self, prompt: list[int], name: str, **more: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4} | more
        return httpx.post(self.gateway.url + TEXTS, json=body, headers={"x-request-id": name}, timeout=240)

    def until(self, status: int) -> None:
        """Wait for what ``/readyz`` says."""
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.gateway.url}/readyz", timeout=10).status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def lines(self, *names: str) -> list[dict[str, object]]:
        """The last audit lines of these requests, each of which has a first one as well."""
        deadline = time.monotonic() + 10
        while not set(names) <= set(ends := self.gateway.ends()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert set(names) <= set(self.gateway.answers())
        return [ends[name] for name in names]


@contextmanager
def engine(
    model: Path, bundle: Path, key_file: Path, port: int, log: Path, *flags: str, **environment: str
) -> Iterator[Popen[bytes]]:
    flags = ("--num-gpu-blocks-override", str(BLOCKS), *flags)
    command = servers.engine_command(model, bundle, key_file, "tiny", port, *flags)
    with servers.process(command, servers.ENVIRONMENT | environment, log) as child:
        servers.wait_until(f"http://127.0.0.1:{port}/guard/status", child, log)
        yield child


@pytest.fixture(scope="module")
def doomed(tiny_model, tiny_bundle_dir, key_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doomed")
    bundle = shutil.copytree(tiny_bundle_dir, folder / "bundle")
    port = servers.free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "engine.log"
    # Long ones, for busy machines, except for the verdict of a stream, which one test waits for in vain.
    times = {"verdict_timeout": "5", "answer_timeout": "200", "idle_timeout": "100", "status_timeout": "10"}
    with (
        engine(tiny_model, bundle, key_file, port, log, *APART) as child,
        gateway_process(folder, url, key_file, **times) as gateway,
    ):
        yield Doomed(url, child, bundle, gateway)


@pytest.fixture
def another(doomed, tiny_model, tiny_bundle_dir, key_file, tmp_path):
    """Makes another engine on the port of the one that has been killed, which the gateway finds by itself."""

    @contextmanager
    def start(*flags: str) -> Iterator[Popen[bytes]]:
        doomed.child.wait(60)
        bundle = shutil.copytree(tiny_bundle_dir, tmp_path / "bundle")
        port = int(doomed.engine.rpartition(":")[2])
        log = tmp_path / "engine.log"
        with engine(tiny_model, bundle, key_file, port, log, *flags, **servers.FORKED) as child:
            doomed.until(200)
            yield child

    return start


@pytest.fixture(scope="module")
def judged(reference, tiny_bundle):
    """``(prompt, whether it is refused)``, all of them far from the threshold."""
    above = tiny_bundle.card.threshold(tiny_bundle.card.default_false_positive_rate).logit
    prompts = world.prompts(60, seed=77, shortest=90, longest=200)
    logits = [float(tiny_bundle.logits(reference.features(p)[None])[0]) for p in prompts]
    found = [(p, x >= above) for p, x in zip(prompts, logits, strict=True) if abs(x - above) > 0.05]
    assert {refused for _, refused in found} == {True, False}
    return found


@pytest.fixture(scope="module")
def safe(judged):
    return next(prompt for prompt, refused in judged if not refused)


async def test_a_pool_that_is_too_small_delays_answers_and_mixes_up_no_verdict(doomed, judged):
    async with httpx.AsyncClient(base_url=doomed.gateway.url, timeout=240) as client:

        async def ask(index: int, prompt: list[int]) -> str:
            body = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": 120,
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = await client.post(TEXTS, json=body, headers={"x-request-id": f"pool-{index}"})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-guard-action"]

        chosen = judged[:24]
        actions = await asyncio.gather(*(ask(index, prompt) for index, (prompt, _) in enumerate(chosen)))
    assert actions == ["refuse" if refused else "pass" for _, refused in chosen]
    assert metric(doomed.engine, "vllm:num_preemptions_total") > 0
    assert doomed.gateway.metric("guard_bypass_total") == 0
    lines = doomed.lines(*(f"pool-{index}" for index in range(len(chosen))))
    assert {(line["status"], line["outcome"]) for line in lines} == {(200, "complete")}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_a_400(doomed, stream):
    answer = doomed.ask([5] * 600, f"long-{stream}", stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "x-guard-action" not in answer.headers
    assert doomed.lines(f"long-{stream}")[0]["status"] == 400


async def test_a_gateway_whose_clock_lags_is_refused_by_the_engine(doomed, safe, key_file, monkeypatch):
    class Clock:
        @staticmethod
        def time() -> float:
            return time.time() - 3600.0

    expired = metric(doomed.engine, "guard_engine_directive_errors_total", reason="expired")
    app = create_app(Settings(engine_url=(doomed.engine,), key_file=key_file))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=240) as client,
    ):
        await eventually(lambda: app.state.gateway.pool.ready, within=20)
        body = {"model": "tiny", "prompt": safe, "max_tokens": 4}
        assert (await client.post(TEXTS, json=body)).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr("guard.verdict.time", Clock)
            answer = await client.post(TEXTS, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guard_directive_refused")
        assert (await client.post(TEXTS, json=body)).status_code == 200
    assert metric(doomed.engine, "guard_engine_directive_errors_total", reason="expired") == expired + 1


def test_a_bundle_that_changes_under_a_running_engine_changes_nothing_until_the_next_start(
    doomed, judged, tiny_bundle
):
    meant = GuardConfig.for_bundle(str(doomed.bundle), tiny_bundle)
    assert meant.load_bundle().digest == tiny_bundle.digest

    def assert_as_ever(name: str) -> None:
        for index, (prompt, refused) in enumerate(judged[:6]):
            answer = doomed.ask(prompt, f"{name}-{index}")
            assert answer.headers["x-guard-action"] == ("refuse" if refused else "pass")
        status = EngineStatus.model_validate(httpx.get(f"{doomed.engine}/guard/status", timeout=10).json())
        assert (status.state, status.bundle) == ("ready", tiny_bundle.digest)
        written = doomed.gateway.answers()
        assert {written[f"{name}-{index}"]["bundle"] for index in range(6)} == {tiny_bundle.digest}

    arrays = doomed.bundle / ARRAY_FILE
    os.truncate(arrays, arrays.stat().st_size // 2)
    assert_as_ever("truncated")
    with pytest.raises(BundleError, match="not a readable bundle"):
        Bundle.load(doomed.bundle)

    shutil.rmtree(doomed.bundle)
    assert_as_ever("gone")
    other = tiny_bundle.card.model_copy(update={"default_false_positive_rate": 0.001})
    assert other != tiny_bundle.card
    Bundle(other, tiny_bundle.scorer, tiny_bundle.patches.values()).save(doomed.bundle)
    assert_as_ever("replaced")
    with pytest.raises(GuardStartupError, match="has changed"):
        meant.load_bundle()


def test_an_engine_core_that_hangs_is_a_504_and_answers_when_it_is_back(doomed, safe):
    core = servers.descendant(doomed.child.pid, "VLLM::EngineCore")
    before = doomed.gateway.metric("guard_errors_total", stage="backend", outcome="closed")
    os.kill(core, signal.SIGSTOP)
    try:
        answer = doomed.ask(safe, "hang", stream=True)
    finally:
        os.kill(core, signal.SIGCONT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")
    assert doomed.gateway.metric("guard_errors_total", stage="backend", outcome="closed") == before + 1
    assert doomed.lines("hang")[0]["status"] == 504
    assert doomed.ask(safe, "back").status_code == 200


def test_a_worker_that_is_killed_ends_its_streams_in_an_error_and_the_gateway_turns_others_away(doomed, safe):
    kill_in_flight(doomed, safe, doomed.child, "Worker")


def test_an_engine_core_that_is_killed_ends_its_streams_in_an_error_and_the_gateway_turns_others_away(
    doomed, another, safe
):
    """The core of an engine whose one worker is no process of its own, which is vLLM's default."""
    with another("--distributed-executor-backend", "uni") as child:
        kill_in_flight(doomed, safe, child, "EngineCore")


def kill_in_flight(doomed: Doomed, safe: list[int], server: Popen[bytes], name: str) -> None:
    """Kill a process of the engine while it answers; its server then ends by itself."""
    victim = servers.descendant(server.pid, f"VLLM::{name}")
    wish = {"stream": True, "max_tokens": 300, "min_tokens": 300, "ignore_eos": True}
    body = {"model": "tiny", "prompt": safe} | wish
    headers, url = {"x-request-id": f"killed-{name}"}, doomed.gateway.url + TEXTS
    with httpx.stream("POST", url, json=body, headers=headers, timeout=240) as stream:
        assert stream.headers["x-guard-action"] == "pass"
        parts = stream.iter_text()
        begun = next(parts)
        os.kill(victim, signal.SIGKILL)
        frames = (begun + "".join(parts)).removesuffix("\n\n").split("\n\n")
    assert any('"error"' in frame for frame in frames[-2:]), frames[-2:]
    assert len(frames) < 300

    deadline, dying = time.monotonic() + 60, 0
    while httpx.get(f"{doomed.gateway.url}/readyz", timeout=10).status_code == 200:
        answer = doomed.ask(safe, f"dying-{name}-{dying}", stream=True)
        assert answer.status_code in (502, 503, 504)
        assert "choices" not in answer.text
        assert time.monotonic() < deadline
        dying += 1
        time.sleep(0.2)
    answer = doomed.ask(safe, f"dead-{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
    assert doomed.gateway.metric("guard_upstream_up") == 0
    assert doomed.gateway.metric("guard_bypass_total") == 0
    names = (f"{what}-{name}" for what in ("killed", "dead"))
    lines = doomed.lines(*names, *(f"dying-{name}-{index}" for index in range(dying)))
    assert [line["status"] for line in lines[:2]] == [200, 503]
    assert lines[0]["outcome"] == "interrupted"
    server.wait(60)


def test_an_api_server_that_is_killed_ends_what_it_was_answering_and_another_is_found(doomed, another, safe):
    """vLLM's engine core does not watch its server: what starts it has to end the whole process group."""
    long = {"max_tokens": 300, "min_tokens": 300, "ignore_eos": True}
    headers, url = {"x-request-id": "broken"}, doomed.gateway.url + TEXTS

    def errors():
        return [doomed.gateway.metric("guard_errors_total", stage=s, outcome="closed") for s in STAGES]

    before = errors()
    with another(*APART) as child, ThreadPoolExecutor(1) as aside:
        body = {"model": "tiny", "prompt": safe, "stream": True} | long
        with httpx.stream("POST", url, json=body, headers=headers, timeout=240) as stream:
            assert stream.headers["x-guard-action"] == "pass"
            parts = stream.iter_text()
            begun = next(parts)
            # Answers are short: without this they could have ended before the server is killed.
            core = servers.descendant(child.pid, "VLLM::EngineCore")
            os.kill(core, signal.SIGSTOP)
            whole = aside.submit(doomed.ask, safe, "whole", **long)
            wait_for(lambda: doomed.gateway.metric("guard_inflight_requests") == 2)
            time.sleep(0.5)  # until it has reached the server
            child.kill()
            os.kill(core, signal.SIGCONT)
            frames = (begun + "".join(parts)).removesuffix("\n\n").split("\n\n")
        assert "upstream_interrupted" in frames[-1]
        assert len(frames) < 300
        answer = whole.result(timeout=240)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
        doomed.until(503)
        answer = doomed.ask(safe, "without")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
    assert doomed.gateway.metric("guard_bypass_total") == 0
    lines = doomed.lines("broken", "whole", "without")
    assert [line["status"] for line in lines] == [200, 502, 503]
    assert lines[0]["outcome"] == "interrupted"
    assert all(now > then for now, then in zip(errors(), before, strict=True))


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_every_request_of_all_these_tests_has_its_audit_lines(doomed):
    answers, ends = doomed.gateway.answers(), doomed.gateway.ends()
    assert set(answers) == set(ends)
    assert all(answers[name]["action"] in ("pass", "refuse") for name in ends if ends[name]["status"] == 200)
