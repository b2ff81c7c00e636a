import asyncio
import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import guard
from guard.sealed import SEAL_ERRORS
from guard.verdict import DIRECTIVE_ERRORS
from service.errors import STAGES
from service.metrics import Metrics
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL
from tests.service.world import eventually, world

NAMES = {
    "guard_requests",
    "guard_score",
    "guard_score_bin",
    "guard_score_reference",
    "guard_time_to_verdict_seconds",
    "guard_request_seconds",
    "guard_upstream_first_byte_seconds",
    "guard_gateway_overhead_seconds",
    "guard_bypass",
    "guard_unscored_shape",
    "guard_errors",
    "guard_inflight_requests",
    "guard_upstream_outstanding_requests",
    "guard_asyncio_tasks",
    "guard_upstream_up",
    "guard_bundle_info",
    "guard_inflight_requests_limit",
    "guard_bundle_mismatch",
    "guard_policy_info",
    "guard_policy_threshold",
    "guard_build_info",
    "guard_policy_reloads",
    "guard_judgements",
    "guard_rejections",
    "guard_test_refusals",
    "guard_upstream_retries",
    "guard_judge_seconds",
    "guard_answers_stopped",
    "guard_answer_stopped_after_tokens",
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
    assert second.registry.get_sample_value("guard_bypass_total", {"reason": "missing"}) == 0


def test_the_first_event_of_every_counter_is_an_increase() -> None:
    """A series that appears with the value 1 has not increased, as Prometheus sees it."""
    metrics = Metrics(CollectorRegistry())
    families = {family.name: family for family in metrics.registry.collect()}
    reasons = {sample.labels["reason"] for sample in families["guard_bypass"].samples}
    assert reasons == words_raised_by("VerdictError") | words_raised_by("SealError", "guard/sealed.py")
    stages = {sample.labels["stage"] for sample in families["guard_errors"].samples}
    assert stages == set(STAGES)


def test_every_directive_error_is_known_beforehand() -> None:
    raised = words_raised_by("DirectiveError") | words_raised_by("SealError", "guard/sealed.py")
    assert raised == {*SEAL_ERRORS, *DIRECTIVE_ERRORS}


def words_raised_by(error: str, file: str = "") -> set[str]:
    """The literal reasons with which an error is raised anywhere in the sources (or in one file)."""
    root = Path(guard.__file__).parent.parent
    files = [root / file] if file else [*root.glob("guard/**/*.py"), *root.glob("service/**/*.py")]
    return {
        word for path in files for word in re.findall(rf'raise {error}\("(\w+)"\)', path.read_text("utf-8"))
    }


async def test_policies_and_their_thresholds_show(tmp_path: Path) -> None:
    text = """
    policies:
      default: {rules: [{above: {fpr: 0.001}, action: refuse}, {above: {fpr: 0.05}, action: tag}]}
      watch: {mode: observe, on_missing_verdict: open}
    """
    async with world(tmp_path, text) as w:
        assert (
            w.metric("guard_policy_info", policy="default", mode="enforce", on_missing_verdict="closed") == 1
        )
        assert w.metric("guard_policy_info", policy="watch", mode="observe", on_missing_verdict="open") == 1
        thresholds = {"refuse": 0.9, "tag": 0.2}
        for action, above in thresholds.items():
            assert w.metric("guard_policy_threshold", policy="default", model=MODEL, action=action) == above
        common = {"model": MODEL, "stream": "true", "verdict": "refuse"}
        for policy, mode, action in (("default", "enforce", "refuse"), ("watch", "observe", "pass")):
            labels = common | {"policy": policy, "mode": mode, "action": action}
            assert w.metric("guard_requests_total", **labels) == 0
        assert w.metric("guard_inflight_requests_limit") == 1024


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


async def test_only_requests_of_clients_are_in_flight(tmp_path: Path) -> None:
    async with world(tmp_path) as w:

        async def shown() -> list[str]:
            lines = (await w.client.get("/metrics")).text.splitlines()
            return [line for line in lines if line.startswith("guard_inflight_requests ")]

        assert await shown() == ["guard_inflight_requests 0.0"]  # and not the question itself
        w.engine.before_headers = 0.5
        asking = asyncio.create_task(w.client.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: len(w.engine.seen) == 1)
        assert await shown() == ["guard_inflight_requests 1.0"]
        assert (await asking).status_code == 200


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
