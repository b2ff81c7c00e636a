"""The gateway's knowledge of the engine, as operators see it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import CollectorRegistry

from guard.sealed import Keyring
from guard.verdict import STATUS_SEAL_HEADER, EngineStatus
from service.backend import Backend, BackendError, BrokenError, UnreachableError
from service.engine import EngineWatch
from service.metrics import Metrics
from service.policy_store import PolicyStore
from service.settings import Settings
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL, a_status
from tests.service.world import World, eventually, world

KEYS = Keyring.generate()


async def until_ready(w: World, ready: bool) -> None:
    await eventually(lambda: (w.watch.ready is not None) == ready)


async def test_ready_only_after_the_self_test(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.engine.status = a_status(state="starting", detail="self-test 3/8")
        await until_ready(w, False)
        response = await w.client.get("/readyz")
        assert response.status_code == 503
        assert "self-test 3/8" in response.json()["detail"]
        assert (await w.client.get("/healthz")).status_code == 200
        assert w.total("guard_upstream_up") == 0
        w.engine.status = a_status()
        await until_ready(w, True)
        assert (await w.client.get("/readyz")).json() == {"status": "ready"}
        assert w.total("guard_upstream_up") == 1


async def test_a_new_bundle_moves_the_thresholds(tmp_path: Path) -> None:
    text = "policies: {default: {rules: [{above: {fpr: 0.01}, action: refuse}]}}"
    async with world(tmp_path, text) as w:
        assert (await w.client.post("/v1/chat/completions", json=BAD_CHAT)).headers[
            "x-guard-action"
        ] == "refuse"
        stricter = a_status().thresholds[1].model_copy(update={"probability": 0.99})
        w.engine.status = a_status(bundle="c" * 64, thresholds=(stricter,))
        watch = w.watch
        await eventually(lambda: watch.ready is not None and watch.ready.status.bundle == "c" * 64)
        assert (await w.client.post("/v1/chat/completions", json=BAD_CHAT)).headers[
            "x-guard-action"
        ] == "pass"
        info = {"model": MODEL, "probe": "unsafe_output", "signed_by": "none"}
        assert w.metric("guard_bundle_info", digest="c" * 64, **info) == 1
        assert w.total("guard_bundle_info") == 1


async def test_a_bundle_that_is_not_listed_keeps_the_gateway_closed(tmp_path: Path) -> None:
    text = f"{{policies: {{default: {{}}}}, bundles: ['{'b' * 64}', '{'d' * 64}']}}"
    async with world(tmp_path, text) as w:
        assert w.total("guard_bundle_mismatch") == 0
        w.engine.status = a_status(bundle="c" * 64)
        await until_ready(w, False)
        assert w.total("guard_bundle_mismatch") == 1
        assert "not under bundles" in w.watch.why
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        w.engine.status = a_status(bundle="d" * 64)
        await until_ready(w, True)
        assert w.total("guard_bundle_mismatch") == 0


async def test_a_policy_that_the_bundle_cannot_meet_keeps_the_gateway_closed(tmp_path: Path) -> None:
    text = "policies: {default: {rules: [{above: {fpr: 0.5}, action: refuse}]}}"
    async with world(tmp_path, text, ready=False) as w:
        await eventually(lambda: "fpr" in w.watch.why)
        assert (await w.client.get("/readyz")).status_code == 503
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 503


async def test_another_audience_is_picked_up_at_once(tmp_path: Path) -> None:
    async with world(tmp_path, status_interval=60.0) as w:
        w.engine.status = a_status(audience="engine-b")
        refused = await w.client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "guard_directive_refused")
        watch = w.watch
        await eventually(lambda: watch.ready.status.audience == "engine-b")
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


class ScriptedBackend:
    """A backend whose status is a list of what happens."""

    name = "engine"
    outstanding = 0

    def __init__(self, *script: EngineStatus | BackendError) -> None:
        self.script = list(script)

    async def status(self) -> EngineStatus:
        step = self.script.pop(0)
        if isinstance(step, BackendError):
            raise step
        return step


def watching(*script: EngineStatus | BackendError) -> EngineWatch:
    backend: object = ScriptedBackend(*script)
    metrics = Metrics(CollectorRegistry())
    store = PolicyStore(None, metrics, needs_keys=False)
    return EngineWatch(backend, store, metrics, Settings(key_file=Path("k")))  # type: ignore[arg-type]


async def test_an_engine_that_loads_for_long_is_still_asked_every_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    def timeout(seconds: float) -> asyncio.Timeout:
        waits.append(seconds)
        if len(waits) == 30:
            raise asyncio.CancelledError
        return asyncio.timeout(0)

    clock = SimpleNamespace(timeout=timeout, sleep=asyncio.sleep, Event=asyncio.Event)
    monkeypatch.setattr("service.engine.asyncio", clock)
    with pytest.raises(asyncio.CancelledError):
        await watching(*[UnreachableError("away")] * 30).run()
    assert waits == sorted(waits), "the first ones follow one another quickly"
    assert (waits[0], waits[-1]) == (0.1, 1.0)


async def test_one_missed_status_is_forgiven_three_are_not() -> None:
    away = UnreachableError("away")
    watch = watching(away, a_status(), away, away, a_status(), away, away, away)
    ready = []
    for _ in range(8):
        await watch.poll()
        ready.append(watch.ready is not None)
    assert ready == [False, True, True, True, True, True, True, False]


async def test_an_engine_that_gives_verdicts_is_not_taken_for_dead() -> None:
    away = UnreachableError("away")
    watch = watching(a_status(), *[away] * 7)
    ready = []
    for misses_so_far in range(8):
        if misses_so_far == 3:
            watch.heard()
        await watch.poll()
        ready.append(watch.ready is not None)
    assert ready == [True, True, True, True, True, False, False, False]


async def test_a_verified_verdict_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr(EngineWatch, "heard", lambda self: heard.append(1))
    async with world(tmp_path) as w:
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert heard == [1]
        w.engine.seal = lambda verdict: None
        assert (await w.client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        assert heard == [1]


async def test_an_engine_that_says_it_is_not_ready_is_believed_at_once() -> None:
    watch = watching(a_status(), a_status(state="failed", detail="self-test"))
    await watch.poll()
    await watch.poll()
    assert watch.ready is None
    assert "self-test" in watch.why


async def test_the_watch_survives_what_nobody_expected() -> None:
    watch = watching()  # popping from an empty script is an IndexError
    task = asyncio.create_task(watch.run())
    await eventually(lambda: "IndexError" in watch.why)
    assert not task.done()
    task.cancel()


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (200, b"{}", BrokenError),
        (200, b"<html>", BrokenError),
        (404, b'{"detail": "Not Found"}', BrokenError),
        (503, b'{"error": {"code": "guard_starting"}}', UnreachableError),
        (200, a_status(state="starting").model_dump_json().encode(), BrokenError),
        (503, a_status().model_dump_json().encode(), BrokenError),
        (200, b" " * (2 << 20), BrokenError),
    ],
)
async def test_a_status_that_is_none(status: int, content: bytes, error: type[BackendError]) -> None:
    with pytest.raises(error):
        await ask_status(status, content, EngineStatus.seal(content, KEYS))


async def test_a_status_sealed_with_a_shared_key_is_believed() -> None:
    body = a_status().model_dump_json().encode()
    assert await ask_status(200, body, EngineStatus.seal(body, KEYS)) == a_status()


@pytest.mark.parametrize(
    "seal",
    [
        None,
        "nonsense",
        EngineStatus.seal(a_status().model_dump_json().encode(), Keyring.generate()),
        EngineStatus.seal(a_status(audience="another").model_dump_json().encode(), KEYS),
    ],
    ids=["none", "no seal", "another key", "another body"],
)
async def test_a_status_of_somebody_else_is_not_believed(seal: str | None) -> None:
    with pytest.raises(BrokenError, match="do both use the same key file"):
        await ask_status(200, a_status().model_dump_json().encode(), seal)


async def ask_status(code: int, content: bytes, seal: str | None) -> EngineStatus:
    headers = {} if seal is None else {STATUS_SEAL_HEADER: seal}
    transport = httpx.MockTransport(lambda request: httpx.Response(code, content=content, headers=headers))
    backend = Backend("http://engine", Settings(key_file=Path("k")), KEYS, transport)
    try:
        return await backend.status()
    finally:
        await backend.close()
