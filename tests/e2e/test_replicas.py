"""Two guarded engines behind one gateway, as real processes."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

from guard.verdict import DIRECTIVE_HEADER, Decision, Directive, EngineStatus, Rule
from tests.e2e import servers
from tests.e2e.servers import API_KEYS, ENVIRONMENT, FORKED
from tests.e2e.test_stack import metric

AT_ONCE = 4
"""Requests under way at one time: with fewer than two, a gateway need not use both engines."""


@pytest.fixture(scope="module")
def second(tiny_model, shaped_bundle_dir, key_file, tmp_path_factory):
    """Another engine beside that of the whole session, and its process. Forked, for the sake of its start."""
    log, port = tmp_path_factory.mktemp("second") / "engine.log", servers.free_port()
    command = servers.engine_command(tiny_model, shaped_bundle_dir, key_file, "tiny", port)
    environment = {**ENVIRONMENT, **FORKED}
    with servers.process(command, environment, log) as child:
        servers.wait_until(f"http://127.0.0.1:{port}/guard/status", child, log)
        yield f"http://127.0.0.1:{port}", child


@pytest.fixture(scope="module")
def engines(stack, second):
    return stack.engine, second[0]


@pytest.fixture(scope="module")
def gateway(engines, key_file, tmp_path_factory):
    with servers.gateway(",".join(engines), key_file, tmp_path_factory.mktemp("replicas")) as url:
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/readyz").json() != {"status": "ready"}:  # it names those that are not
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url


def tokens_read(engine):
    return metric(engine, "vllm:prompt_tokens_total")


async def answers(url, prompts):
    """Completion tokens of each prompt's answer."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEYS["message"], max_retries=0) as client:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def one(prompt):
            async with at_once:
                answer = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True}
                )
            return answer.usage.completion_tokens

        return await asyncio.gather(*map(one, prompts))


def test_both_engines_answer_and_both_refuse(gateway, engines, prompts):
    unsafe, safe = prompts
    before = [tokens_read(engine) for engine in engines]
    assert asyncio.run(answers(gateway, [unsafe, safe] * 12)) == [0, 4] * 12
    read = [tokens_read(engine) - was for engine, was in zip(engines, before, strict=True)]
    assert min(read) >= 4 * len(safe), "each has its part of the requests"
    assert sum(read) == 12 * (len(unsafe) + len(safe)), "and each request is read once"
    for engine in engines:
        assert metric(engine, "guard_engine_missing_verdicts_total") == 0


def test_an_order_for_one_engine_is_not_taken_by_the_other(gateway, engines, keys, prompts):
    audiences = {
        EngineStatus.model_validate(httpx.get(f"{engine}/guard/status").json()).audience for engine in engines
    }
    assert len(audiences) == 2
    body = httpx.Request("POST", "http://x", json={"model": "tiny", "prompt": prompts[1], "max_tokens": 1})
    decision = Decision(policy="p", rules=(Rule(above=0.5, action="refuse"),))
    for engine in engines:
        answered = []
        for audience in audiences:
            order = Directive.issue(decision, audience=audience, body=body.content).seal(keys)
            headers = {DIRECTIVE_HEADER: order, "content-type": "application/json"}
            answer = httpx.post(f"{engine}/v1/completions", content=body.content, headers=headers)
            answered.append(answer.status_code)
        assert sorted(answered) == [200, 400]


def test_requests_go_on_under_guard_when_one_engine_has_ended(gateway, engines, second, prompts):
    _, child = second
    child.terminate()
    assert child.wait(60) == 0
    before = tokens_read(engines[0])
    assert asyncio.run(answers(gateway, list(prompts) * 6)) == [0, 4] * 6
    assert tokens_read(engines[0]) - before == 6 * sum(map(len, prompts))
