"""Hundreds of requests at once on a real engine, under every action, some left by their clients half-way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter

import httpx
import pytest

from tests.e2e import servers
from tests.e2e.test_stack import metric
from tests.engine import world

COUNT = 320
AT_RATE = {"fpr": 0.01}
POLICIES = {
    "refuse": {},
    "observe": {"mode": "observe"},
    "tag": {"rules": [{"above": AT_RATE, "action": "tag"}]},
    "patch": {"rules": [{"above": AT_RATE, "action": "patch", "patch": "quiet", "still_unsafe": "pass"}]},
}
DONE = {"refuse": "refuse", "observe": "pass", "tag": "tag", "patch": "patch"}
"""What each does with an unsafe prompt."""


@pytest.fixture(scope="module")
def gateway(stack, key_file, tmp_path_factory):
    served = {
        "policies": {name: policy | {"expose_score": True} for name, policy in POLICIES.items()},
        "keys": [
            {"sha256": hashlib.sha256(f"sk-{name}".encode()).hexdigest(), "tenant": name, "policy": name}
            for name in POLICIES
        ],
    }
    with servers.gateway(stack.engine, key_file, tmp_path_factory.mktemp("interleaved"), served) as url:
        yield url


@pytest.fixture(scope="module")
def scored(reference, tiny_bundle):
    """Prompts clear of the threshold, each with its logit by transformers."""
    found = [[*p, *world.TAIL] for p in world.prompts(60, seed=61, shortest=10, longest=90)]
    logits = [float(tiny_bundle.logits(reference.features(p)[None])[0]) for p in found]
    return [(p, logit) for p, logit in zip(found, logits, strict=True) if abs(logit) > 0.02][:40]


async def ask(client, prompt, policy, *, stream=False):
    """Headers and text of one answer."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": stream}
    got = await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer sk-{policy}"})
    assert got.status_code == 200, got.text
    if not stream:
        return got.headers, got.json()["choices"][0]["text"]
    frames = [json.loads(f.removeprefix("data: ")) for f in got.text.split("\n\n") if "{" in f]
    return got.headers, "".join(choice["text"] for frame in frames for choice in frame["choices"])


async def asked(client, rng, prompt, policy):
    """One request of the crowd; None for one whose client has left."""
    await asyncio.sleep(rng.random() * 3)
    stream = rng.random() < 0.5
    if rng.random() < 0.8:
        return await ask(client, prompt, policy, stream=stream)
    try:
        async with asyncio.timeout(rng.random() * 0.3):
            return await ask(client, prompt, policy, stream=stream)
    except TimeoutError:
        return None


async def test_each_gets_its_own_verdict_and_its_own_answer_whoever_else_is_there(
    stack, gateway, scored, tiny_bundle
):
    rng = random.Random(5)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=gateway, timeout=120.0, limits=limits) as client:
        alone = {}
        for i, (prompt, logit) in enumerate(scored):
            alone[i, "pass"] = (await ask(client, prompt, "observe"))[1]
            if logit > 0:
                alone[i, "patch"] = (await ask(client, prompt, "patch"))[1]
        assert len(set(alone.values())) > len(scored), "answers must tell whose they are"
        crowd = [(rng.randrange(len(scored)), rng.choice(list(POLICIES))) for _ in range(COUNT)]
        answers = await asyncio.gather(*(asked(client, rng, scored[i][0], policy) for i, policy in crowd))
    seen = Counter()
    for (i, policy), answer in zip(crowd, answers, strict=True):
        if answer is None:
            seen["left"] += 1
            continue
        headers, text = answer
        logit = scored[i][1]
        action = DONE[policy] if logit > 0 else "pass"
        seen[action] += 1
        expected = tiny_bundle.card.calibration.probability(logit)
        assert float(headers["x-guard-score"]) == pytest.approx(expected, abs=1e-3)
        assert (headers["x-guard-action"], headers["x-guard-policy"]) == (action, policy)
        if action == "refuse":
            assert text == "I can't help with that."
        else:
            assert text == alone[i, "patch" if action == "patch" else "pass"]
    assert set(seen) == {"left", "pass", "tag", "refuse", "patch"}
    assert min(seen.values()) > 15
    assert metric(gateway, "guard_bypass_total") == 0
    deadline = time.monotonic() + 20
    while metric(stack.engine, "vllm:num_requests_running") + metric(
        stack.engine, "vllm:num_requests_waiting"
    ):
        assert time.monotonic() < deadline, "requests of clients that have left are still running"
        await asyncio.sleep(0.1)
