from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from tests.service.world import BAD_CHAT, CHAT, MODEL, world

NAMES = {
    "guard_requests",
    "guard_score",
    "guard_time_to_verdict_seconds",
    "guard_request_seconds",
    "guard_upstream_first_byte_seconds",
    "guard_gateway_overhead_seconds",
    "guard_bypass",
    "guard_errors",
    "guard_inflight_requests",
    "guard_upstream_up",
    "guard_bundle_info",
}


def test_every_name_has_the_prefix_and_a_description() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    families = list(registry.collect())
    assert {family.name for family in families} == NAMES
    assert all(family.documentation for family in families)


def test_two_gateways_do_not_share_metrics() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.bypass.labels("missing").inc()
    assert second.registry.get_sample_value("guard_bypass_total", {"reason": "missing"}) is None


async def test_what_a_request_leaves_behind(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for body in (CHAT, CHAT | {"stream": True}, BAD_CHAT, BAD_CHAT | {"stream": True}):
            assert (await w.client.post("/v1/chat/completions", json=body)).status_code == 200
        common = {"policy": "default", "model": MODEL, "mode": "enforce"}
        for action in ("pass", "refuse"):
            for stream in ("true", "false"):
                labels = common | {"verdict": action, "action": action, "stream": stream}
                assert w.metric("guard_requests_total", **labels) == 1
        assert w.metric("guard_score_count", model=MODEL) == 4
        assert w.metric("guard_score_sum", model=MODEL) == 2 * 0.97 + 2 * 0.01
        assert w.metric("guard_request_seconds_count") == 4
        assert w.metric("guard_time_to_verdict_seconds_count") == 3
        assert w.metric("guard_upstream_first_byte_seconds_count") == 2
        assert w.metric("guard_gateway_overhead_seconds_count") == 4
        assert w.metric("guard_inflight_requests") == 0
        assert w.total("guard_bypass_total") == 0
        assert w.total("guard_errors_total") == 0


async def test_labels_do_not_grow_with_what_clients_send(tmp_path: Path) -> None:
    async with world(tmp_path) as w:

        async def series() -> int:
            text = (await w.client.get("/metrics")).text
            return sum(len(family.samples) for family in text_string_to_metric_families(text))

        async def traffic(word: str) -> None:
            headers = {"x-request-id": word, "authorization": f"Bearer {word}"}
            for body in (CHAT | {"user": word}, CHAT | {"model": word}, CHAT | {word: 1}):
                await w.client.post("/v1/chat/completions", json=body, headers=headers)
            await w.client.get(f"/{word}")

        await traffic("a")
        before = await series()
        for index in range(10):
            await traffic(f"word{index}")
        assert await series() == before
