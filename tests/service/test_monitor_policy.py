"""The policy's monitor: how it is written, and what the bundle must have for it."""

from pathlib import Path

import pytest

from guard.monitor import Monitor
from service.policy import PolicyError, judged_safe
from service.policy_file import bind
from tests.service.answers import CHATS, assert_unanswered
from tests.service.fake_engine import CHAT, FakeEngine, a_monitor, a_status
from tests.service.test_policy import load
from tests.service.test_pool import fleet
from tests.service.test_reload import RELOAD, rewrite
from tests.service.world import eventually, world

WATCHES = """policies:
  default:
    monitor: {fpr: 0.01, debounce: 4}
"""
WATCHING = a_status(monitor=a_monitor((0.001, 4), (0.01, 1), (0.01, 4)))


def test_it_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert bind(load(tmp_path, "policies: {default: {}}"), WATCHING)["default"].decision.monitor is None


@pytest.mark.parametrize("rules", ["", "    rules: [{above: {fpr: 0.01}, action: refuse}]\n"])
def test_rate_and_debounce_name_one_threshold_of_the_bundle(rules: str, tmp_path: Path) -> None:
    bound = bind(load(tmp_path, WATCHES + rules), WATCHING)["default"]
    assert bound.decision.monitor == Monitor(logit=WATCHING.monitor[2].logit, debounce=4)
    assert bound.policy.monitor is not None
    assert bound.policy.monitor.text == "keep"


def test_what_a_judge_finds_safe_is_watched_all_the_same(tmp_path: Path) -> None:
    decision = bind(load(tmp_path, WATCHES), WATCHING)["default"].decision
    assert judged_safe(decision).monitor == decision.monitor


@pytest.mark.parametrize(
    ("monitor", "says"),
    [
        ("{fpr: 0.01}", "policies.default.monitor.debounce"),
        ("{debounce: 4}", "policies.default.monitor.fpr"),
        ("{fpr: 0, debounce: 4}", "policies.default.monitor.fpr"),
        ("{fpr: 1.0, debounce: 4}", "policies.default.monitor.fpr"),
        ("{fpr: 0.01, debounce: 0}", "policies.default.monitor.debounce"),
        ("{fpr: 0.01, debounce: 65}", "policies.default.monitor.debounce"),
        ("{fpr: 0.01, debounce: 4, text: hide}", "policies.default.monitor.text"),
        ("{fpr: 0.01, debounce: 4, logit: 1}", "policies.default.monitor.logit is not a known key"),
        ("true", "policies.default.monitor"),
    ],
)
def test_a_wrong_one_is_refused_with_file_and_line(monitor: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml, line 3") as caught:
        load(tmp_path, f"policies:\n  default:\n    monitor: {monitor}\n")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (a_status(), "the probe of the bundle in force watches no answers"),
        (
            a_status(monitor=a_monitor((0.01, 1), (0.001, 4))),
            "monitor thresholds for: fpr 0.01 with debounce 1, fpr 0.001 with debounce 4",
        ),
    ],
)
def test_a_bundle_without_the_threshold_is_an_error(status: object, says: str, tmp_path: Path) -> None:
    policies = load(tmp_path, WATCHES)
    with pytest.raises(PolicyError, match=r"line 3: policies\.default\.monitor: ") as caught:
        bind(policies, status)  # type: ignore[arg-type]
    assert says in str(caught.value)


async def test_an_engine_that_watches_no_answers_answers_nobody(tmp_path: Path) -> None:
    async with world(tmp_path, WATCHES, ready=False) as w:
        await eventually(lambda: "watches no answers" in w.watch.why)
        assert_unanswered(await w.client.post(CHATS, json=CHAT), "engine_not_ready")
        assert w.engine.seen == []


async def test_an_engine_that_comes_back_with_such_a_bundle_answers_nobody(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.status = WATCHING
    async with world(tmp_path, WATCHES, engine=engine) as w:
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200
        engine.status = a_status(bundle="c" * 64)
        await eventually(lambda: not w.app.state.gateway.pool.ready)
        assert_unanswered(await w.client.post(CHATS, json=CHAT), "engine_not_ready")


async def test_of_several_engines_only_those_that_can_watch_are_asked(tmp_path: Path) -> None:
    async with fleet(tmp_path, "policies: {default: {}}", size=2, policy_interval=0) as f:
        can = f.engines["two"]
        can.status = WATCHING.model_copy(update={"audience": "engine-two"})
        await eventually(lambda: len(f.w.app.state.gateway.pool.ready) == 2)
        await eventually(
            lambda: any(w.ready and w.ready.status.monitor for w in f.w.app.state.gateway.pool.watches)
        )
        f.engines["one"].status = a_status(audience="engine-one", state="failed")
        await eventually(lambda: len(f.w.app.state.gateway.pool.ready) == 1)
        rewrite(tmp_path, WATCHES)
        assert (await f.w.client.post(RELOAD)).status_code == 200
        f.engines["one"].status = a_status(audience="engine-one")
        await eventually(lambda: "watches no answers" in f.watch("one").why)
        for _ in range(3):
            assert (await f.ask()).status_code == 200
        assert set(f.seen) == {"two"}


async def test_a_new_file_that_the_bundle_cannot_fulfil_stays_out_of_force(tmp_path: Path) -> None:
    async with world(tmp_path, "policies: {default: {}}", policy_interval=0) as w:
        rewrite(tmp_path, WATCHES)
        answer = await w.client.post(RELOAD)
        assert answer.status_code == 409
        assert "line 3: policies.default.monitor: " in answer.json()["error"]["message"]
        assert (await w.client.post(CHATS, json=CHAT)).status_code == 200


async def test_a_verdict_of_a_probe_that_cannot_watch_lets_no_answer_out(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.status = WATCHING
    engine.change = lambda verdict: verdict.model_copy(update={"read": "prompt_last"})
    async with world(tmp_path, WATCHES, engine=engine) as w:
        assert_unanswered(await w.client.post(CHATS, json=CHAT))
        assert w.metric("guard_bypass_total", reason="inconsistent") == 1
