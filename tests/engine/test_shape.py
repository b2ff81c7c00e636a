"""Prompts that end otherwise than those the probe was fitted on: what the ledger says of them."""

from types import SimpleNamespace

import pytest

from guard.engine.config import GuardConfig
from guard.engine.exchange import Exchange
from guard.engine.ledger import Ledger
from guard.sealed import Keyring
from guard.verdict import UNSCORED_SHAPE, Decision, Directive, Rule, Verdict
from tests.engine.cards import PROMPTS, REFUSE_AT_HALF, card

KEYS = Keyring.generate()
TAILS = ((5, 7), (8,))
ACCEPTED = ([1, 5, 7], [9, 9, 9, 5, 7], [1, 8], [5, 8])
OTHER = ([5, 7], [8], [1, 7], [7, 5], [5, 7, 1], [8, 1], [1, 5, 7, 5], [7], list(range(5000)))


def ledger(tails: tuple[tuple[int, ...], ...] = TAILS, default: Decision = REFUSE_AT_HALF) -> Ledger:
    made = Ledger(
        card(prompt_tails=tails), bundle="b" * 64, dtype="float32", default=default, keys=KEYS,
        audience="here",
    )  # fmt: skip
    for prompt, logit in zip(PROMPTS, (1.0, -1.0), strict=True):
        assert judge(made, list(prompt), logit).action == "checked"  # the self-test has any shape
    return made


def judge(made: Ledger, prompt: list[int], logit: float | None = -5.0, order: Decision | None = None):
    sealed = order and Directive.issue(order, audience="here", body=b"{}").seal(KEYS)
    made.open("r", prompt=prompt, prompt_tokens=len(prompt), directive=sealed)
    found = made.judge("r", logit)
    made.close("r")
    return found


@pytest.mark.parametrize("prompt", ACCEPTED)
def test_prompt_that_ends_as_the_bundle_says_is_judged_by_its_score(prompt):
    for logit, action in ((-5.0, "pass"), (5.0, "refuse")):
        verdict = judge(ledger(), prompt, logit)
        assert (verdict.action, verdict.unscored_shape, verdict.reason) == (action, False, None)


@pytest.mark.parametrize("prompt", OTHER, ids=lambda prompt: str(prompt[:4]))
def test_prompt_of_another_shape_is_refused_however_low_its_score(prompt):
    verdict = judge(ledger(), prompt)
    assert (verdict.action, verdict.decision, verdict.unsafe) == ("refuse", "refuse", True)
    assert (verdict.unscored_shape, verdict.reason) == (True, UNSCORED_SHAPE)


@pytest.mark.parametrize("prompt", OTHER, ids=lambda prompt: str(prompt[:4]))
def test_policy_may_let_the_shape_through_and_then_the_rules_hold(prompt):
    lenient = REFUSE_AT_HALF.model_copy(update={"unscored_shape": "pass"})
    for logit, action in ((-5.0, "pass"), (5.0, "refuse")):
        for verdict in (
            judge(ledger(), prompt, logit, lenient),
            judge(ledger(default=lenient), prompt, logit),
        ):
            assert (verdict.action, verdict.unscored_shape, verdict.reason) == (action, True, None)


def test_shape_comes_before_every_rule():
    for action, patch in (("tag", None), ("escalate", None), ("pass", None)):
        order = Decision(policy="p", rules=(Rule(above=0.0, action=action, patch=patch),))
        assert judge(ledger(), [1, 2], 5.0, order).action == "refuse"
    assert judge(ledger(), [1, 2], 5.0, Decision(policy="p", rules=())).action == "refuse"


def test_observing_and_checking_report_the_shape_and_do_what_their_mode_does():
    for mode, action in (("observe", "pass"), ("check", "checked")):
        verdict = judge(ledger(), [1, 2], order=REFUSE_AT_HALF.model_copy(update={"mode": mode}))
        assert (verdict.action, verdict.decision, verdict.unscored_shape) == (action, "refuse", True)
        assert verdict.reason is None


def test_missing_score_is_an_error_whatever_the_shape():
    for prompt in ([1, 2], [1, 8]):
        assert judge(ledger(), prompt, None).reason == "no_score"


def test_bundle_without_tails_takes_prompts_of_any_shape():
    for prompt in (*ACCEPTED, *OTHER):
        verdict = judge(ledger(()), prompt)
        assert (verdict.action, verdict.unscored_shape) == ("pass", False)


def of_sibling(odd: bool, unscored_shape: str, probability: float) -> Verdict:
    order = Decision(policy="p", mode="observe", rules=(), unscored_shape=unscored_shape)
    verdict = judge(ledger(), [1, 2] if odd else [1, 8], -5.0, order)
    return verdict.model_copy(update={"probability": probability})


@pytest.mark.parametrize("unscored_shape", ["refuse", "pass"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_sibling_of_another_shape_marks_all(order, unscored_shape):
    """Also where the other one, whose score is higher, is the one that binds."""
    siblings = [of_sibling(True, unscored_shape, 0.1), of_sibling(False, unscored_shape, 0.3)]
    exchange = Exchange("gateway", Directive.issue(REFUSE_AT_HALF, audience="a", body=b"", siblings=2))
    for i in order:
        exchange.register(f"r{i}", prompt_id=f"r{i}", prompt_tokens=2)
    for i in order:
        exchange.record(f"r{i}", siblings[i])
    assert exchange.binding is not None
    assert (exchange.binding.decision, exchange.binding.unscored_shape) == (unscored_shape, True)


@pytest.mark.parametrize(("flags", "said"), [([], "refuse"), (["--guard-unscored-shape", "pass"], "pass")])
def test_operators_choose_for_requests_without_a_directive(flags, said):
    from guard.engine.launch import guard_arguments, guard_config

    options = guard_arguments().parse_args(["--bundle", "b", *flags])
    config = guard_config(options, SimpleNamespace(card=card(), digest="b" * 64))
    assert config.default.unscored_shape == said


@pytest.mark.filterwarnings("ignore", "error:::guard")  # vLLM and its dependencies warn a lot
@pytest.mark.parametrize("tails", [TAILS, ()])
def test_the_status_says_whether_shapes_are_checked(tails):
    assert a_readiness(tails).status.checks_shape == bool(tails)


@pytest.mark.filterwarnings("ignore", "error:::guard")
def test_an_engine_that_was_told_to_stop_is_never_ready_again():
    readiness = a_readiness(())
    readiness.set("stopping", "it will be stopped")
    readiness.set("ready", "all self-test prompts matched")  # which were on their way
    assert readiness.status.state == "stopping"
    readiness.set("failed", "they did not match")
    assert readiness.status.state == "failed"


def a_readiness(tails):
    from guard.engine.readiness import Readiness

    model = SimpleNamespace(served_model_name="m", max_model_len=8)
    parallel = SimpleNamespace(data_parallel_size=1)
    client = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model, parallel_config=parallel))
    config = GuardConfig(bundle="b", bundle_sha256="b" * 64, default=REFUSE_AT_HALF)
    return Readiness(client, config, card(prompt_tails=tails), "a")
