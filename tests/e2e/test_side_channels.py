"""What answers and the prefix cache tell of scores and of other tenants, on a real engine."""

from __future__ import annotations

import hashlib
import json

import httpx
import pytest

from tests.e2e import servers
from tests.e2e.servers import API_KEYS
from tests.e2e.test_stack import metric, raw, user
from tests.engine import world

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class TestCaches:
    @pytest.fixture(scope="class")
    def tenants(self, stack, key_file, tmp_path_factory):
        """A gateway with two tenants that are kept apart, and one that shares with everybody."""
        who = {"a": ("acme", "own"), "a2": ("acme", "own"), "b": ("brass", "own"), "c": ("clay", "shared")}
        served = {
            "policies": {"own": {"prefix_cache": "tenant"}, "shared": {}},
            "keys": [
                {"sha256": hashlib.sha256(f"sk-{n}".encode()).hexdigest(), "tenant": tenant, "policy": policy}
                for n, (tenant, policy) in who.items()
            ],
        }
        with servers.gateway(stack.engine, key_file, tmp_path_factory.mktemp("tenants"), served) as url:
            yield url

    @staticmethod
    def ask(stack, url, name, prompt):
        """Tokens found in the prefix cache, and the answer, for one client."""
        before = metric(stack.engine, "vllm:prefix_cache_hits_total")
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "temperature": 0}
        auth = {"authorization": f"Bearer sk-{name}"}
        answer = httpx.post(url + TEXT, json=body, headers=auth, timeout=60.0)
        assert answer.status_code == 200, answer.text
        return metric(stack.engine, "vllm:prefix_cache_hits_total") - before, answer

    @pytest.mark.parametrize("kind", ["passed", "refused"])
    def test_tenants_find_their_own_blocks_only(self, stack, tenants, reference, tiny_bundle, kind):
        sign = 1 if kind == "refused" else -1
        prompt = next(
            p
            for p in ([*body, *world.TAIL] for body in world.prompts(60, seed=77, shortest=100))
            if len(p) > 99 and sign * tiny_bundle.logits(reference.features(p)[None])[0] > 0.3
        )
        whole = 32 * ((len(prompt) - 1) // 32)
        found, bodies = {}, set()
        for turn in ("a", "a", "b", "a2", "b", "c", "c"):
            cached, answer = self.ask(stack, tenants, turn, prompt)
            found.setdefault(turn, []).append(cached)
            assert answer.headers["x-guard-action"] == ("refuse" if kind == "refused" else "pass")
            document = answer.json()
            bodies.add(json.dumps([document["choices"], document["usage"]]))
        assert found == {"a": [0, whole], "a2": [whole], "b": [0, whole], "c": [0, whole]}
        assert len(bodies) == 1, "what was cached must not show in an answer"

    def test_clients_of_vllm_itself_do_not_find_them(self, stack, tenants):
        prompt = [*world.prompts(1, seed=78, shortest=100)[0], *world.TAIL]
        assert [self.ask(stack, tenants, "a", prompt)[0] for _ in range(2)] == [
            0,
            32 * ((len(prompt) - 1) // 32),
        ]
        for salt in ({}, {"cache_salt": "acme"}):
            before = metric(stack.engine, "vllm:prefix_cache_hits_total")
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, **salt}
            raw(stack, TEXT, body, base=stack.engine)
            assert metric(stack.engine, "vllm:prefix_cache_hits_total") == before


def test_no_score_is_shown_unless_the_policy_says_so(stack, chats):
    for key, shown in (("message", False), ("content_filter", False), ("scored", True)):
        for text in chats:
            answer = raw(stack, CHAT, {"model": "tiny", "messages": [user(text)], "max_tokens": 2}, key=key)
            assert ("x-guard-score" in answer.headers) == shown
            if not shown:
                names = [name for name in answer.headers if name.startswith("x-guard-")]
                assert sorted(names) == ["x-guard-action", "x-guard-policy"]
    auth = {"authorization": f"Bearer {API_KEYS['message']}"}
    body = {"model": "tiny", "input": list(chats)}
    results = httpx.post(f"{stack.gateway}/v1/moderations", json=body, headers=auth, timeout=60).json()[
        "results"
    ]
    assert [result["category_scores"]["unsafe"] for result in results] == [1.0, 0.0]
