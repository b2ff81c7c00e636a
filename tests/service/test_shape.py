"""Prompts that do not end as the chat template ends them: what clients, counters and auditors are told."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from guard.verdict import UNSCORED_SHAPE, Decision, Rule, Verdict, VerdictError
from service.audit import logger as audit_logger
from service.policy_file import PolicyError, load_policies
from tests.service.fake_engine import BAD_CHAT, CHAT, MODEL, SECRET, FakeEngine, a_status
from tests.service.test_directives import KEYS, issue, verdict
from tests.service.world import World, world

TEXT = {"model": MODEL, "prompt": "hello"}
POLICIES = """
policies:
  default: {}
  lenient: {unscored_shape: pass}
  watching: {mode: observe}
assign:
  - {model: lab/tiny, policy: %s}
"""


def shaped(engine: FakeEngine) -> None:
    """Have the engine treat text completions as a guarded vLLM does."""

    def change(found: Verdict) -> Verdict:
        seen = engine.seen[-1]
        if "prompt" not in seen.body:
            return found
        marked = {"unscored_shape": True}
        if seen.directive.decision.refuses(True):
            marked |= {"decision": "refuse", "unsafe": True, "reason": UNSCORED_SHAPE}
            if found.mode == "enforce":
                marked |= {"action": "refuse"}
        return found.model_copy(update=marked)

    engine.change = change


async def ask(w: World, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    shaped(w.engine)
    return await w.client.post(path, json=body)


def counted(w: World, policy: str) -> dict[str, float]:
    return {
        action: w.metric("guard_unscored_shape_total", policy=policy, model=MODEL, action=action)
        for action in ("pass", "refuse")
    }


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, audit_logger.name)
    return lambda: [json.loads(r.message) for r in caplog.records if r.name == audit_logger.name]


@pytest.mark.parametrize("stream", [False, True])
async def test_by_default_a_raw_prompt_is_an_error_that_says_what_to_do(
    tmp_path: Path, stream: bool, lines: Any
) -> None:
    async with world(tmp_path) as w:
        got = await ask(w, TEXT | {"stream": stream})
        assert got.status_code == 400
        error = got.json()["error"]
        assert (error["code"], error["param"]) == ("unscored_prompt_shape", "prompt")
        assert "/v1/chat/completions" in error["message"]
        assert (got.headers["x-guard-action"], "x-guard-score" in got.headers) == ("refuse", False)
        assert SECRET not in got.text
        assert counted(w, "default") == {"pass": 0, "refuse": 1}
        assert w.metric(
            "guard_requests_total", policy="default", model=MODEL, verdict="refuse", action="refuse",
            mode="enforce", stream=str(stream).lower(),
        ) == 1  # fmt: skip
        answer, end = lines()
        assert (answer["unscored_shape"], answer["verdict"], answer["action"]) == (True, "refuse", "refuse")
        assert answer["code"] == "unscored_prompt_shape"
        assert end["completion_tokens"] == 0


async def test_chat_keeps_its_shape(tmp_path: Path, lines: Any) -> None:
    async with world(tmp_path) as w:
        got = await ask(w, CHAT, "/v1/chat/completions")
        assert got.json()["choices"][0]["message"]["content"] == SECRET
        assert counted(w, "default") == {"pass": 0, "refuse": 0}
        assert lines()[0]["unscored_shape"] is False


@pytest.mark.parametrize(("policy", "action"), [("lenient", "pass"), ("watching", "pass")])
async def test_policy_that_lets_the_shape_through_has_it_counted(
    tmp_path: Path, policy: str, action: str, lines: Any
) -> None:
    async with world(tmp_path, POLICIES % policy) as w:
        got = await ask(w, TEXT)
        assert got.json()["choices"][0]["text"] == SECRET
        assert got.headers["x-guard-action"] == action
        assert counted(w, policy) == {"pass": 1, "refuse": 0}
        assert lines()[0]["unscored_shape"] is True


async def test_a_high_score_is_refused_as_ever_where_the_shape_is_let_through(tmp_path: Path) -> None:
    async with world(tmp_path, POLICIES % "lenient") as w:
        got = await ask(w, TEXT | {"prompt": "bomb"})
        assert got.json()["choices"][0]["text"] == "I can't help with that."
        assert counted(w, "lenient") == {"pass": 0, "refuse": 1}


async def test_scores_of_such_prompts_do_not_look_like_drift(tmp_path: Path) -> None:
    async with world(tmp_path, POLICIES % "lenient") as w:
        await ask(w, TEXT)
        assert w.metric("guard_score_count", model=MODEL) == 0
        await ask(w, CHAT, "/v1/chat/completions")
        assert w.metric("guard_score_count", model=MODEL) == 1


async def test_harmful_chat_is_refused_in_the_style_of_the_policy(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        got = await ask(w, BAD_CHAT, "/v1/chat/completions")
        assert got.json()["choices"][0]["message"]["refusal"] == "I can't help with that."


async def test_the_directive_says_what_the_policy_says(tmp_path: Path) -> None:
    for policy, said in (("default", "refuse"), ("lenient", "pass"), ("watching", "refuse")):
        async with world(tmp_path, POLICIES % policy) as w:
            await ask(w, CHAT, "/v1/chat/completions")
            assert w.engine.seen[0].directive.decision.unscored_shape == said


async def test_a_policy_with_the_engines_own_rules_still_has_its_own_word_on_shapes(tmp_path: Path) -> None:
    engine = FakeEngine()
    lenient = Decision(
        policy="engine-default", rules=(Rule(above=0.5, action="refuse"),), unscored_shape="pass"
    )
    engine.status = a_status(default=lenient)
    async with world(tmp_path, engine=engine) as w:
        assert (await ask(w, TEXT)).status_code == 400


async def test_operators_are_told_of_a_bundle_that_does_not_say_how_prompts_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests bring libraries that configure logging, and disable or quieten what they find.
    monkeypatch.setattr(logging.getLogger("neuronguard.gateway"), "disabled", False)
    caplog.set_level(logging.WARNING, logger="neuronguard.gateway")
    engine = FakeEngine()
    async with world(tmp_path, engine=engine):
        assert "unscored_shape has no effect" not in caplog.text
    engine.status = a_status(checks_shape=False)
    async with world(tmp_path, engine=engine):
        assert "unscored_shape has no effect" in caplog.text


@pytest.mark.parametrize("value", ["refused", "true", "''", "[pass]"])
def test_other_words_in_the_policy_file_are_refused_by_place(tmp_path: Path, value: str) -> None:
    (tmp_path / "p.yaml").write_text(f"policies:\n  default:\n    unscored_shape: {value}\n")
    with pytest.raises(PolicyError, match=r"line 3: policies\.default\.unscored_shape"):
        load_policies(tmp_path / "p.yaml")


ENFORCE = Decision(policy="p", rules=(Rule(above=0.8, action="patch", patch="mean"),))
LENIENT = ENFORCE.model_copy(update={"unscored_shape": "pass"})


@pytest.mark.parametrize(
    ("decision", "changes", "believed"),
    [
        (ENFORCE, {"action": "refuse"}, True),
        (ENFORCE, {"action": "pass"}, False),
        (ENFORCE, {"action": "patch", "probability": 0.9, "patch": "mean"}, False),
        (ENFORCE, {"action": "refuse", "probability": 0.9}, True),
        (LENIENT, {"action": "pass"}, True),
        (LENIENT, {"action": "refuse"}, False),
        (LENIENT, {"action": "patch", "probability": 0.9, "patch": "mean"}, True),
    ],
)
def test_a_verdict_on_such_a_prompt_is_believed_if_it_does_what_was_ordered(
    decision: Decision, changes: dict[str, Any], believed: bool
) -> None:
    order = issue(decision)
    sealed = verdict(order, unscored_shape=True, **changes).seal(KEYS)
    if believed:
        assert order.verify(sealed, KEYS).unscored_shape
    else:
        with pytest.raises(VerdictError, match="inconsistent"):
            order.verify(sealed, KEYS)
