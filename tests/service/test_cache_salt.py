"""Whose requests may share blocks of the engine's prefix cache."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from guard.sealed import Keyring
from service.policy_file import PolicyError, load_policies
from tests.service.fake_engine import CHAT, MODEL, FakeEngine
from tests.service.world import world

KEYS = {"a1": "acme", "a2": "acme", "b1": "brass"}
DIGESTS = {name: hashlib.sha256(name.encode()).hexdigest() for name in KEYS}
POLICY = """
policies:
  default: {prefix_cache: %s}
keys:
""" + "".join(
    f"  - {{sha256: '{DIGESTS[n]}', tenant: {t}, rights: [chat, checks]}}\n" for n, t in KEYS.items()
)
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "hello"},
    "/v1/moderations": {"model": MODEL, "input": "hello"},
    "/v1/guard/check": {"model": MODEL, "input": "hello"},
}


async def salts(folder: Path, setting: str, path: str, engine: FakeEngine | None = None) -> list[str | None]:
    """What the engine is sent for each key."""
    async with world(folder, POLICY % setting, engine=engine) as w:
        for name in KEYS:
            got = await w.client.post(path, json=REQUESTS[path], headers={"x-api-key": name})
            assert got.status_code == 200, got.text
        return [seen.body.get("cache_salt") for seen in w.engine.seen]


@pytest.mark.parametrize("path", REQUESTS)
async def test_tenants_are_apart_where_the_policy_says_so(tmp_path: Path, path: str) -> None:
    first, second, other = await salts(tmp_path, "tenant", path)
    assert first == second
    assert first != other
    for salt in (first, other):
        assert salt is not None
        assert len(salt) == 64  # vLLM accepts up to 128 characters, of which some are forbidden
        assert set(salt) <= set("0123456789abcdef")


@pytest.mark.parametrize("path", REQUESTS)
async def test_by_default_everybody_shares(tmp_path: Path, path: str) -> None:
    assert await salts(tmp_path, "shared", path) == [None] * 3


async def test_the_salt_hangs_on_the_key_ring_and_not_on_the_process(tmp_path: Path) -> None:
    keys = Keyring.generate()
    found = []
    for ring in (keys, keys, Keyring.generate()):
        found.append(await salts(tmp_path, "tenant", "/v1/chat/completions", FakeEngine(ring)))
    assert found[0] == found[1] != found[2]


async def test_requests_without_an_api_key_have_a_namespace_of_their_own(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {prefix_cache: tenant}}") as w:
        await w.client.post("/v1/chat/completions", json=CHAT)
        assert len(w.engine.seen[0].body["cache_salt"]) == 64


async def test_a_clients_own_salt_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for path, body in REQUESTS.items():
            if path == "/v1/guard/check":
                continue  # needs a right
            got = await w.client.post(path, json=body | {"cache_salt": "mine"})
            assert (got.status_code, got.json()["error"]["param"]) == (400, "cache_salt")
        assert w.engine.seen == []


def test_other_words_in_the_policy_file_are_refused_by_place(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("policies:\n  default:\n    prefix_cache: private\n")
    with pytest.raises(PolicyError, match=r"line 3: policies\.default\.prefix_cache"):
        load_policies(tmp_path / "p.yaml")
