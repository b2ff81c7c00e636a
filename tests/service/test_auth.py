import hashlib
from pathlib import Path

import pytest

from service.auth import authenticate
from service.errors import ApiError
from service.policy import Policy
from service.policy_file import Policies
from tests.service.fake_engine import CHAT
from tests.service.world import world

KEY = "sk-acme-1"


def policies() -> Policies:
    return Policies.model_validate(
        {
            "policies": {"default": Policy(), "strict": Policy()},
            "keys": [
                {"sha256": hashlib.sha256(b"sk-other").hexdigest(), "tenant": "other"},
                {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "acme", "policy": "strict"},
            ],
        }
    )


def test_a_key_leads_to_its_tenant_and_policy() -> None:
    for name, value in (
        ("authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer  {KEY} "),
        ("x-api-key", KEY),
        ("api-key", KEY),
    ):
        found = authenticate(policies(), {name: value})
        assert found is not None
        assert (found.tenant, policies().policy_for(found, "any")) == ("acme", "strict")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \udcff"]
)
def test_anything_else_is_a_401(header: str) -> None:
    with pytest.raises(ApiError) as caught:
        authenticate(policies(), {"authorization": header})
    assert caught.value.status == 401
    assert caught.value.code == "invalid_api_key"
    assert KEY not in caught.value.message


def test_without_keys_everybody_gets_the_default_policy() -> None:
    open_to_all = Policies(policies={"default": Policy()})
    assert authenticate(open_to_all, {}) is None
    assert open_to_all.policy_for(None, "any") == "default"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/lab/tiny"),
    ],
)
async def test_every_api_route_wants_the_key(method: str, path: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    text = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {digest}, tenant: acme}}]"
    async with world(tmp_path, text) as w:
        refused = await w.client.request(method, path, json=CHAT)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert w.engine.seen == []
        allowed = await w.client.request(method, path, json=CHAT, headers={"authorization": f"Bearer {KEY}"})
        assert allowed.status_code != 401


async def test_operators_routes_do_not(tmp_path: Path) -> None:
    text = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {'a' * 64}, tenant: acme}}]"
    async with world(tmp_path, text) as w:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            assert (await w.client.get(path)).status_code == 200


async def test_the_clients_key_never_reaches_the_engine(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.client.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {KEY}"})
        assert "authorization" not in w.engine.seen[0].headers
