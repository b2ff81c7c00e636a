"""What the gateway exports for drift to be seen: live scores in the bins of the bundle's reference."""

from __future__ import annotations

from pathlib import Path

from guard.reference import ScoreReference
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL, FakeEngine, a_status
from tests.service.world import World, eventually, world

REFERENCE = ScoreReference(edges=(0.005, 0.5, 0.97), benign=(10, 80, 9, 1), harmful=(0, 1, 2, 3))


def engine(**changes: object) -> FakeEngine:
    made = FakeEngine()
    made.status = a_status(reference=REFERENCE, **changes)
    return made


def bins(w: World, digest: str = "b" * 64, model: str = MODEL) -> list[float]:
    names = ("00", "01", "02", "03")
    return [w.metric("guard_score_bin_total", model=model, digest=digest, bin=name) for name in names]


async def shows(w: World, digest: str) -> bool:
    """Whether scores of a bundle are exported."""
    lines = (await w.client.get("/metrics")).text.splitlines()
    return any(line.startswith("guard_score_bin_total{") and digest in line for line in lines)


async def test_every_score_falls_into_one_bin_and_one_at_an_edge_into_the_upper(tmp_path: Path) -> None:
    async with world(tmp_path, engine=engine()) as w:
        assert bins(w) == [0, 0, 0, 0]
        for body in (CHAT, CHAT | {"stream": True}, BAD_CHAT):
            await w.client.post("/v1/chat/completions", json=body)
        assert bins(w) == [0, 2, 0, 1]
        await w.client.post("/v1/moderations", json={"input": ["hello", "hello"]})
        assert bins(w) == [0, 4, 0, 1]
        assert w.total("guard_score_count") == 5


async def test_the_reference_is_shown_beside_them(tmp_path: Path) -> None:
    async with world(tmp_path, engine=engine(adapters=("tuned",))) as w:
        for name, counts in (("benign", REFERENCE.benign), ("harmful", REFERENCE.harmful)):
            for model in (MODEL, "tuned"):
                labels = {"model": model, "digest": "b" * 64, "class": name}
                shown = [w.metric("guard_score_reference", bin=f"{i:02}", **labels) for i in range(4)]
                assert shown == list(counts)
        assert bins(w, model="tuned") == [0, 0, 0, 0]


async def test_a_bundle_without_reference_has_no_such_series(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.client.post("/v1/chat/completions", json=CHAT)
        text = (await w.client.get("/metrics")).text
        assert "guard_score_count" in text
        assert "guard_score_bin_total{" not in text
        assert "guard_score_reference{" not in text


async def test_bins_of_a_bundle_that_is_no_longer_in_force_are_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path, engine=engine()) as w:
        await w.client.post("/v1/chat/completions", json=CHAT)
        w.engine.status = a_status(reference=REFERENCE, bundle="c" * 64)
        await eventually(lambda: shows(w, "c" * 64))
        assert not await shows(w, "b" * 64)
        assert w.total("guard_score_reference") == sum(REFERENCE.benign + REFERENCE.harmful)


async def test_a_score_of_another_bundle_than_the_known_one_is_not_binned(tmp_path: Path) -> None:
    async with world(tmp_path, engine=engine()) as w:
        w.engine.change = lambda verdict: verdict.model_copy(update={"bundle": "d" * 64})
        await w.client.post("/v1/chat/completions", json=CHAT)
        assert w.metric("guard_score_count", model=MODEL) == 1
        assert bins(w) == [0, 0, 0, 0]
        assert not await shows(w, "d" * 64)
