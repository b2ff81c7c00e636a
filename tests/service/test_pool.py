"""Several engines: who gets a request, and what happens when one fails."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.sealed import Keyring
from service.breaker import Breaker
from service.engine import EngineWatch
from tests.service.answers import CHATS, assert_unanswered
from tests.service.fake_engine import CHAT, HARMFUL, MODEL, FakeEngine, a_status
from tests.service.world import World, eventually, world

URLS = "http://one:1,http://two:2,http://three:3"


class Network(httpx.AsyncBaseTransport):
    """Connects to fake engines by their host name, and can cut them off in two ways."""

    def __init__(self, engines: dict[str, FakeEngine]) -> None:
        self._transports = {name: httpx.ASGITransport(engine) for name, engine in engines.items()}
        self.unreachable: set[str] = set()
        self.breaking: set[str] = set()
        self.asked: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if host in self.unreachable:
            raise httpx.ConnectError("no", request=request)
        if request.method == "POST":
            self.asked[host] += 1
            if host in self.breaking:
                raise httpx.RemoteProtocolError("gone", request=request)
        return await self._transports[host].handle_async_request(request)


@dataclass
class Fleet:
    w: World
    network: Network
    engines: dict[str, FakeEngine]

    async def ask(self, **more: Any) -> httpx.Response:
        return await self.w.client.post(CHATS, json=CHAT | more)

    def watch(self, name: str) -> EngineWatch:
        watches = self.w.app.state.gateway.pool.watches
        return next(watch for watch in watches if watch.backend.name.startswith(name))

    @property
    def seen(self) -> dict[str, int]:
        return {name: len(engine.seen) for name, engine in self.engines.items() if engine.seen}


@contextlib.asynccontextmanager
async def fleet(
    folder: Path, policy: str | None = None, size: int = 3, **changes: Any
) -> AsyncIterator[Fleet]:
    keys = Keyring.generate()
    engines = {name: FakeEngine(keys) for name in ("one", "two", "three")[:size]}
    for name, engine in engines.items():
        engine.status = a_status(audience=f"engine-{name}")
    network = Network(engines)
    urls = ",".join(URLS.split(",")[:size])
    async with world(
        folder, policy, engine=next(iter(engines.values())), network=network, engine_url=urls, **changes
    ) as w:
        await eventually(lambda: len(w.app.state.gateway.pool.ready) == size)
        yield Fleet(w, network, engines)


async def test_equally_busy_engines_take_turns(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        for _ in range(9):
            assert (await f.ask()).status_code == 200
        assert f.seen == {"one": 3, "two": 3, "three": 3}


async def test_the_least_busy_engine_is_asked(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        f.engines["one"].before_headers = f.engines["two"].before_headers = 0.5
        slow = [asyncio.create_task(f.ask()) for _ in range(3)]
        await eventually(lambda: len(f.engines["one"].seen) == len(f.engines["two"].seen) == 1)
        await eventually(lambda: f.watch("three").backend.outstanding == 0)
        for _ in range(5):
            await f.ask()
        assert f.seen == {"one": 1, "two": 1, "three": 6}
        assert [answer.status_code for answer in await asyncio.gather(*slow)] == [200] * 3
        assert all(watch.backend.outstanding == 0 for watch in f.w.app.state.gateway.pool.watches)


async def test_a_request_that_was_not_sent_goes_to_another_engine_with_a_fresh_nonce(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, status_interval=60.0) as f:
        f.network.unreachable = {"one"}
        for _ in range(4):
            assert (await f.ask()).status_code == 200
        assert f.seen == {"two": 4}
        directives = [seen.directive for seen in f.engines["two"].seen]
        assert len({directive.nonce for directive in directives}) == 4
        assert {directive.audience for directive in directives} == {"engine-two"}
        assert f.w.metric("guard_upstream_retries_total") >= 1
        assert f.w.total("guard_errors_total") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_was_sent_is_not_sent_again(stream: bool, tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, status_interval=60.0) as f:
        f.network.breaking = {"one", "two"}
        assert (await f.ask(stream=stream)).status_code == 502
        assert f.network.asked.total() == 1
        assert f.w.metric("guard_upstream_retries_total") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_a_verdict_is_not_tried_elsewhere_nor_shown(
    stream: bool, tmp_path: Path
) -> None:
    async with fleet(tmp_path, size=2) as f:
        for engine in f.engines.values():
            engine.seal = lambda verdict: None
        assert_unanswered(await f.ask(stream=stream))
        assert sum(f.seen.values()) == 1


async def test_a_verdict_of_one_engine_is_none_of_another(tmp_path: Path) -> None:
    """Nonces are for one run: what one engine has sealed does not let out the answer of another."""
    async with fleet(tmp_path, size=2) as f:
        sealed: list[str] = []
        for engine in f.engines.values():
            engine.seal = lambda verdict: sealed.append(verdict.seal(f.engines["one"].keys)) or sealed[0]
        assert (await f.ask()).status_code == 200
        assert (await f.ask()).status_code == 503


async def test_when_no_engine_can_be_reached_the_client_is_told(tmp_path: Path) -> None:
    async with fleet(tmp_path, status_interval=60.0) as f:
        f.network.unreachable = {"one", "two", "three"}
        answer = await f.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unreachable")
        assert "retry-after" in answer.headers


async def test_an_engine_whose_guard_is_not_ready_gets_nothing(tmp_path: Path) -> None:
    async with fleet(tmp_path, f"{{policies: {{default: {{}}}}, bundles: ['{'b' * 64}']}}") as f:
        f.engines["one"].status = a_status(state="failed", detail="self-test")
        f.engines["two"].status = a_status(bundle="c" * 64)
        await eventually(lambda: f.watch("one").ready is None and f.watch("two").ready is None)
        for _ in range(4):
            assert (await f.ask()).status_code == 200
        assert f.seen == {"three": 4}
        ready = await f.w.client.get("/readyz")
        assert ready.status_code == 200
        assert "one:1: the engine is failed: self-test" in ready.json()["detail"]
        assert f.w.metric("guard_upstream_up", backend="one:1") == 0
        assert f.w.metric("guard_upstream_up", backend="three:3") == 1
        f.engines["three"].status = a_status(state="failed")
        await eventually(lambda: f.watch("three").ready is None)
        assert (await f.w.client.get("/readyz")).status_code == 503
        assert (await f.ask()).status_code == 503


async def test_each_engine_is_told_the_thresholds_of_its_own_bundle(tmp_path: Path) -> None:
    text = "policies: {default: {rules: [{above: {fpr: 0.01}, action: refuse}]}}"
    async with fleet(tmp_path, text, size=2) as f:
        stricter = a_status().thresholds[1].model_copy(update={"probability": 0.99})
        f.engines["two"].status = a_status(bundle="c" * 64, thresholds=(stricter,), audience="engine-two")
        await eventually(
            lambda: f.watch("two").ready is not None and f.watch("two").ready.status.bundle[0] == "c"
        )
        harmful = [{"role": "user", "content": HARMFUL}]
        actions = [(await f.ask(messages=harmful)).headers["x-guard-action"] for _ in range(2)]
        assert sorted(actions) == ["pass", "refuse"]
        told = {name: engine.seen[0].directive.decision.rules[0].above for name, engine in f.engines.items()}
        assert told == {"one": 0.5, "two": 0.99}
        assert f.w.total("guard_bundle_info") == 2


async def test_a_request_goes_to_an_engine_that_serves_its_model(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2) as f:
        f.engines["two"].status = a_status(model="other", adapters=("tuned",), audience="engine-two")
        await eventually(lambda: "other" in f.watch("two").served)
        listed = (await f.w.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in listed] == [
            (MODEL, None),
            ("other", None),
            ("tuned", "other"),
        ]
        for model in ("other", "tuned", MODEL, "other"):
            assert (await f.ask(model=model)).status_code == 200
        assert f.seen == {"one": 1, "two": 3}
        assert (await f.ask(model="gone")).status_code == 404
        f.engines["two"].status = a_status(state="starting")
        await eventually(lambda: f.watch("two").ready is None)
        assert (await f.ask(model="other")).status_code == 503


async def test_an_engine_that_fails_again_and_again_is_left_alone_for_a_while(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, breaker_failures=3, breaker_pause=0.3) as f:
        f.network.breaking = {"one"}
        statuses = [(await f.ask()).status_code for _ in range(12)]
        assert statuses.count(502) == 3
        assert f.network.asked["one"] == 3
        f.network.breaking = set()
        await asyncio.sleep(0.35)
        assert [(await f.ask()).status_code for _ in range(4)] == [200] * 4
        assert f.network.asked["one"] > 3


async def test_an_engine_that_gives_no_verdicts_is_left_alone_too(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, breaker_failures=2, breaker_pause=30.0) as f:
        f.engines["one"].seal = lambda verdict: None
        statuses = [(await f.ask()).status_code for _ in range(10)]
        assert (statuses.count(503), statuses.count(200)) == (2, 8)


def test_a_breaker_lets_one_request_try_and_waits_longer_each_time() -> None:
    now = [0.0]
    breaker = Breaker(2, 10.0, lambda: now[0])
    breaker.failed()
    assert not breaker.open
    breaker.failed()
    assert breaker.open
    for pause in (10, 20, 40, 60, 60):
        now[0] += pause - 0.1
        assert breaker.open
        now[0] += 0.2
        assert not breaker.open
        breaker.enter()
        assert breaker.open  # for everybody else
        breaker.failed()
        assert breaker.open
    now[0] += 61
    breaker.enter()
    breaker.gave_up()
    assert not breaker.open
    breaker.enter()
    breaker.succeeded()
    breaker.failed()
    assert not breaker.open


async def test_saturation_counts_all_engines(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, max_connections=2) as f:
        for engine in f.engines.values():
            engine.before_headers = 0.3
        answers = await asyncio.gather(*(f.ask() for _ in range(4)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 503, 503]


def talk(turns: int, who: int = 0) -> list[dict[str, str]]:
    said = [{"role": "user", "content": f"I am {who}"}]
    for turn in range(turns):
        said += [{"role": "assistant", "content": f"a{turn}"}, {"role": "user", "content": f"u{turn}"}]
    return [{"role": "system", "content": "be kind"}, *said]


async def test_affinity_keeps_a_conversation_at_one_engine(tmp_path: Path) -> None:
    async with fleet(tmp_path, affinity=True) as f:
        for who in range(12):
            before = f.seen
            for turns in range(3):
                await f.ask(messages=talk(turns, who))
            assert sorted(count - before.get(name, 0) for name, count in f.seen.items()) in (
                [3],
                [0, 3],
                [0, 0, 3],
            )
        assert len(f.seen) == 3  # and conversations spread


async def test_affinity_gives_way_to_load_and_to_failure(tmp_path: Path) -> None:
    async with fleet(tmp_path, size=2, affinity=True, status_interval=60.0) as f:
        await f.ask(messages=talk(0))
        (home,) = f.seen
        f.engines[home].before_headers = 0.5
        answers = [asyncio.create_task(f.ask(messages=talk(0))) for _ in range(8)]
        await asyncio.gather(*answers)
        assert len(f.seen) == 2
        f.network.unreachable = {home}
        assert (await f.ask(messages=talk(0))).status_code == 200


async def test_a_new_policy_file_counts_for_all_engines_or_for_none(tmp_path: Path) -> None:
    text = "policies: {default: {rules: [{above: {fpr: 0.01}, action: refuse}]}}"
    async with fleet(tmp_path, text, size=2, policy_interval=0) as f:
        only = a_status().thresholds[1:2]
        f.engines["two"].status = a_status(thresholds=only, audience="engine-two")
        await eventually(
            lambda: f.watch("two").ready is not None and f.watch("two").ready.status.thresholds == only
        )
        (tmp_path / "policy.yaml").write_text(text.replace("0.01", "0.001"))  # "one" could, "two" cannot
        assert (await f.w.client.post("/admin/policies/reload")).status_code == 409
        for name in ("one", "two"):
            ready = f.watch(name).ready
            assert ready is not None
            assert ready.policies["default"].decision.rules[0].above == 0.5
