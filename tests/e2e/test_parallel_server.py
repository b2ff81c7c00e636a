"""Two data-parallel ranks behind one API server and one gateway, with a LoRA adapter, over HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import openai
import pytest
from transformers import AutoModelForCausalLM

from guard.bundle import Bundle
from guard.cli import main
from guard.merge import merge
from guard.verdict import EngineStatus
from loadtests.random_model import Reference
from tests.e2e import servers
from tests.e2e.servers import API_KEYS, Stack
from tests.e2e.test_stack import metric
from tests.engine import world
from tests.guard import worlds

RANKS = 2
UNDER_WAY = 12
"""Streams, and as many whole answers, when a rank is killed."""
FLAGS = ("--data-parallel-size", str(RANKS), "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    return worlds.adapter(tmp_path_factory.mktemp("adapter") / "tuned", base, size=0.25)


@pytest.fixture(scope="module")
def bundle_dir(tiny_model, tiny_bundle_dir, adapter, tmp_path_factory):
    target = tmp_path_factory.mktemp("listed") / "bundle"
    main(
        [
            *("bundle", "adapter", str(tiny_bundle_dir), "--model", str(tiny_model)),
            *("--adapter", f"tuned={adapter}", "--out", str(target)),
        ],
        standalone_mode=False,
    )
    return target


@pytest.fixture(scope="module")
def parallel(tiny_model, bundle_dir, adapter, key_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    flags = (*FLAGS, "--lora-modules", f"tuned={adapter}")
    with (
        servers.engine(
            tiny_model,
            bundle_dir,
            key_file,
            "tiny",
            folder / "engine.log",
            *flags,
            environment={"VLLM_CPU_OMP_THREADS_BIND": "|".join("01")},
        ) as engine,
        servers.gateway(engine, key_file, folder) as gateway,
    ):
        yield Stack(engine, gateway, folder)


@pytest.fixture(scope="module")
def expected(tiny_model, bundle_dir, adapter):
    """By model name: prompts and whether they are refused, clear of the threshold."""
    from guard.adapters import Adapter

    bundle, prompts, found = Bundle.load(bundle_dir), world.prompts(40, seed=91, longest=120), {}
    for name in ("tiny", "tuned"):
        reference = Reference(tiny_model, world.SITES)
        if name == "tuned":
            merge(reference.model, Adapter.open(adapter, name))
        logits = [float(bundle.logits(reference.features(p)[None])[0]) for p in prompts]
        found[name] = [(p, x > 0) for p, x in zip(prompts, logits, strict=True) if abs(x) > 0.05]
    return found


def test_every_rank_has_matched_with_and_without_the_adapter(parallel, tiny_bundle):
    status = EngineStatus.model_validate(httpx.get(f"{parallel.engine}/guard/status").json())
    total = RANKS * 2 * len(tiny_bundle.card.self_test.prompts)
    assert status.detail == f"all {total} self-test prompts matched"
    assert status.names == ("tiny", "tuned")


async def test_both_ranks_refuse_and_answer_as_they_should(parallel, expected):
    async with openai.AsyncOpenAI(
        base_url=f"{parallel.gateway}/v1", api_key=API_KEYS["message"], max_retries=0
    ) as client:
        assert [model.id async for model in client.models.list()] == ["tiny", "tuned"]

        at_once = asyncio.Semaphore(16)  # two ranks and their workers already wait for two cores

        async def refused(name, prompt):
            async with at_once:
                answer = await client.completions.create(model=name, prompt=prompt, max_tokens=4)
            return answer.usage.completion_tokens == 0

        asked = [(name, prompt, bad) for name, cases in expected.items() for prompt, bad in cases]
        got = await asyncio.gather(*(refused(name, prompt) for name, prompt, _ in asked))
        assert got == [bad for *_, bad in asked]
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="hello", max_tokens=4)
    for rank in range(RANKS):
        assert metric(parallel.engine, "vllm:prompt_tokens_total", engine=str(rank)) > 300
    assert metric(parallel.engine, "guard_engine_missing_verdicts_total") == 0


def test_actions_differ_under_the_adapter(expected):
    answers = [{tuple(p): bad for p, bad in expected[name]} for name in ("tiny", "tuned")]
    shared = answers[0].keys() & answers[1].keys()
    assert any(answers[0][prompt] != answers[1][prompt] for prompt in shared)


def test_an_engine_core_that_is_killed_takes_its_server_along_and_nothing_is_answered_without_it(
    parallel, expected
):
    """One of two ranks. The last test of this engine."""
    prompts = sorted(expected["tiny"], key=lambda case: len(case[0]))
    safe, unsafe = (next(p for p, bad in prompts if bad == wanted) for wanted in (False, True))
    asyncio.run(killed_while_it_answers(parallel, safe))

    def ask(prompt):
        auth = {"authorization": f"Bearer {API_KEYS['message']}"}
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
        return httpx.post(f"{parallel.gateway}/v1/completions", json=body, headers=auth, timeout=90)

    deadline = time.monotonic() + 60
    while httpx.get(f"{parallel.gateway}/readyz", timeout=10).status_code == 200:
        # The other rank may be faster than the news; then it refuses as ever.
        answer = ask(unsafe)
        assert answer.status_code in (502, 503, 504) or answer.headers["x-guard-action"] == "refuse"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    answer = ask(safe)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_not_ready")
    assert metric(parallel.gateway, "guard_upstream_up") == 0
    assert metric(parallel.gateway, "guard_bypass_total") == 0


async def killed_while_it_answers(parallel, safe):
    """Streams and whole answers are under way on both ranks: each is whole, cut off or an error."""
    core = servers.descendant(servers.server_process(parallel.engine), "VLLM::EngineCore_DP1")
    length = 500 - len(safe)
    long = {"max_tokens": length, "extra_body": {"min_tokens": length, "ignore_eos": True}}
    begun = asyncio.Event()
    async with openai.AsyncOpenAI(
        base_url=f"{parallel.gateway}/v1", api_key=API_KEYS["message"], max_retries=0, timeout=120
    ) as client:

        async def streamed():
            reasons = []
            async for part in await client.completions.create(model="tiny", prompt=safe, stream=True, **long):
                reasons += [choice.finish_reason for choice in part.choices]
                begun.set()
            return reasons[-1]

        async def whole():
            answer = await client.completions.create(model="tiny", prompt=safe, **long)
            return answer.choices[0].finish_reason

        under_way = [asyncio.create_task(each()) for each in (streamed, whole) * UNDER_WAY]
        await asyncio.wait_for(begun.wait(), 60)
        os.kill(core, signal.SIGKILL)
        ended = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 120)
    # Where vLLM still has the time to say so, what was under way ends there with "abort".
    assert all(each in ("length", "abort") or isinstance(each, openai.APIError) for each in ended), ended
    for kind in (ended[::2], ended[1::2]):
        assert any(each != "length" for each in kind)
    assert {e.status_code for e in ended[1::2] if isinstance(e, openai.APIStatusError)} <= {502, 503, 504}
    cut = sum(isinstance(each, openai.APIError) for each in ended[::2])
    assert metric(parallel.gateway, "guard_errors_total", stage="stream", outcome="closed") <= cut
