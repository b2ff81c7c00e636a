"""What one key, and all of them together, may ask for."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.errors import ApiError
from service.key_index import KeyIndex
from service.limits import KeyLimits
from service.metrics import Metrics
from service.policy_file import ApiKey
from tests.service.answers import CHATS
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL
from tests.service.world import World, eventually, live, world

MINE = {"authorization": "Bearer mine"}


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def keys(**limits: Any) -> str:
    mine = f"sha256: {digest('mine')}, tenant: a" + "".join(f", {k}: {v}" for k, v in limits.items())
    return f"policies: {{default: {{}}}}\nkeys: [{{{mine}}}, {{sha256: {digest('other')}, tenant: b}}]"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def attempts(limits: KeyLimits, key: ApiKey, count: int) -> list[str | None]:
    """``retry-after`` of each attempt, None where it was let in."""
    waits: list[str | None] = []
    for _ in range(count):
        try:
            with limits.request(key):
                waits.append(None)
        except ApiError as error:
            waits.append(error.headers["retry-after"])
    return waits


def test_no_minute_holds_more_than_the_limit() -> None:
    clock = Clock()
    limits = KeyLimits(Metrics(CollectorRegistry()), clock)
    key = ApiKey(sha256="a" * 64, tenant="t", requests_per_minute=3)
    assert attempts(limits, key, 2) == [None, None]
    clock.now += 20.5
    assert attempts(limits, key, 3) == [None, "40", "40"]
    clock.now += 39.4
    assert attempts(limits, key, 1) == ["1"]
    clock.now += 0.2
    assert attempts(limits, key, 3) == [None, None, "21"]


def test_a_lowered_limit_counts_what_was_used_before() -> None:
    clock = Clock()
    limits = KeyLimits(Metrics(CollectorRegistry()), clock)
    key = ApiKey(sha256="a" * 64, tenant="t", requests_per_minute=5)
    for _ in range(4):
        assert attempts(limits, key, 1) == [None]
        clock.now += 10
    assert attempts(limits, key.model_copy(update={"requests_per_minute": 2}), 1) == ["40"]


def test_keys_do_not_share_their_limits() -> None:
    limits = KeyLimits(Metrics(CollectorRegistry()))
    for name in "ab":
        key = ApiKey(sha256=name * 64, tenant="t", requests_per_minute=1)
        assert attempts(limits, key, 1) == [None]


@pytest.mark.parametrize("path", [CHATS, "/v1/completions", "/v1/moderations"])
async def test_over_the_rate_is_a_429_that_reaches_no_engine(path: str, tmp_path: Path) -> None:
    async with world(tmp_path, keys(requests_per_minute=2)) as w:
        body = {"input": "x"} if path.endswith("moderations") else {"model": MODEL, "prompt": "x"}
        body = CHAT if path == CHATS else body
        for _ in range(2):
            assert (await w.client.post(path, json=body, headers=MINE)).status_code == 200
        over = await w.client.post(path, json=body, headers=MINE)
        assert (over.status_code, over.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert over.json()["error"]["type"] == "rate_limit_error"
        assert 50 <= int(over.headers["retry-after"]) <= 60
        assert len(w.engine.seen) == 2
        assert w.metric("guard_rejections_total", reason="rate") == 1
        other = await w.client.post(path, json=body, headers={"authorization": "Bearer other"})
        assert other.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_has_so_many_requests_at_one_time(stream: bool, tmp_path: Path) -> None:
    async with world(tmp_path, keys(max_concurrent=1)) as w:
        w.engine.before_headers = 0.3
        first = asyncio.create_task(w.client.post(CHATS, json=CHAT | {"stream": stream}, headers=MINE))
        await eventually(lambda: len(w.engine.seen) == 1)
        second = await w.client.post(CHATS, json=CHAT, headers=MINE)
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        assert (await first).status_code == 200
        assert await fine(w)
        assert w.metric("guard_rejections_total", reason="concurrency") == 1


async def test_a_stream_holds_its_place_to_its_last_byte(tmp_path: Path) -> None:
    with live(tmp_path, keys(max_concurrent=1)) as gate:
        gate.engine.stream = [b": begins\n\n", 0.4, b"data: [DONE]\n\n"]
        async with httpx.AsyncClient(base_url=gate.url, headers=MINE) as client:
            async with client.stream("POST", CHATS, json=CHAT | {"stream": True}) as stream:
                await anext(stream.aiter_raw())
                assert (await client.post(CHATS, json=CHAT)).status_code == 429
            gate.engine.stream = None

            async def free() -> bool:
                return (await client.post(CHATS, json=CHAT)).status_code == 200

            await eventually(free)  # the client has left the stream


async def fine(w: World) -> bool:
    return (await w.client.post(CHATS, json=CHAT, headers=MINE)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [CHAT | {"nonsense": 1}, {"model": "other", "messages": CHAT["messages"]}, BAD_CHAT],
    ids=["invalid", "unknown model", "refused"],
)
async def test_every_end_of_a_request_frees_its_place(body: dict[str, Any], tmp_path: Path) -> None:
    async with world(tmp_path, keys(max_concurrent=1)) as w:
        for _ in range(3):
            assert (await w.client.post(CHATS, json=body, headers=MINE)).status_code != 429
        w.engine.seal = lambda verdict: None
        assert (await w.client.post(CHATS, json=CHAT, headers=MINE)).status_code == 503
        w.engine.reset()
        assert await fine(w)


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (CHATS, {"messages": [{"role": "user", "content": "x"}] * 4}, "too_many_messages", "messages"),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 90}]}, "prompt_too_long", "messages"),
        (
            CHATS,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 90}]}]},
            "prompt_too_long",
            "messages",
        ),
        ("/v1/completions", {"prompt": ["x" * 50, "y" * 50]}, "prompt_too_long", "prompt"),
        ("/v1/completions", {"prompt": [7] * 90}, "prompt_too_long", "prompt"),
        ("/v1/completions", {"prompt": [[7] * 50, [7] * 50]}, "prompt_too_long", "prompt"),
        ("/v1/moderations", {"input": ["x" * 50, "y" * 50]}, "prompt_too_long", "input"),
    ],
)
async def test_prompts_have_a_size(
    path: str, body: dict[str, Any], code: str, param: str, tmp_path: Path
) -> None:
    async with world(tmp_path, max_messages=3, max_prompt_chars=80) as w:
        answer = await w.client.post(path, json={"model": MODEL} | body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
        assert w.engine.seen == []


def test_a_key_is_found_by_its_secret_alone() -> None:
    made = [ApiKey(sha256=digest(f"k{i}"), tenant=f"t{i}") for i in range(100)]
    index = KeyIndex(made)
    assert all(index.find(f"k{i}") is made[i] for i in range(100))
    assert [index.find(secret) for secret in ("", "k100", made[0].sha256, "\udcff")] == [None] * 4


RIGHTS = {
    CHATS: "chat",
    "/v1/completions": "chat",
    "/admin/policies/reload": "admin",
}


@pytest.mark.parametrize("path", RIGHTS)
async def test_each_route_wants_its_right(path: str, tmp_path: Path) -> None:
    others = [right for right in ("chat", "checks", "admin") if right != RIGHTS[path]]
    async with world(tmp_path, keys(rights=f"[{', '.join(others)}]")) as w:
        answer = await w.client.post(path, json=CHAT, headers=MINE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_rights")
        assert answer.json()["error"]["type"] == "permission_error"
        assert w.engine.seen == []
