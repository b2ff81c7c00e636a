import math

import pytest

from guard.bundle import Calibration
from guard.engine.errors import GuardStartupError
from guard.engine.ledger import Ledger
from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Rule
from tests.engine.cards import PROMPTS, REFUSE_AT_HALF, card

KEYS = Keyring.generate()


def ledger(*, armed: bool = True, keys: Keyring | None = KEYS, dtype: str = "float32") -> Ledger:
    made = Ledger(card(), bundle="b" * 64, dtype=dtype, default=REFUSE_AT_HALF, keys=keys, audience="here")
    if armed:
        for i, (prompt, logit) in enumerate(zip(PROMPTS, (1.0, -1.0), strict=True)):
            made.open(f"t{i}", prompt=prompt, prompt_tokens=len(prompt), directive=None)
            assert made.judge(f"t{i}", logit).action == "checked"
            made.close(f"t{i}")
    return made


def directive(decision: Decision, keys: Keyring = KEYS, audience: str = "here") -> str:
    return Directive.issue(decision, audience=audience, body=b"{}").seal(keys)


def judge(made: Ledger, logit: float | None, **options: object):
    made.open("r", **{"prompt": [9, 7], "prompt_tokens": 1, "directive": None, **options})
    return made.judge("r", logit)


def test_default_policy_refuses_above_its_threshold_and_passes_below():
    assert judge(ledger(), 0.1).action == "refuse"
    verdict = judge(ledger(), -0.1)
    assert (verdict.action, verdict.unsafe, verdict.read, verdict.prompt_tokens) == (
        "pass",
        False,
        "prompt_last",
        1,
    )
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(0.1)))


def test_isotonic_probabilities_are_decided_on_where_the_bundle_says():
    calibration = Calibration(
        kind="isotonic", slope=0.5, offset=0.0, knots=((-1.0, -2.0), (0.0, 0.5), (2.0, 0.75))
    )
    made = Ledger(
        card(calibration=calibration), bundle="b" * 64, dtype="float32", default=REFUSE_AT_HALF, keys=KEYS,
        audience="here",
    )  # fmt: skip
    for prompt, logit in zip(PROMPTS, (1.0, -1.0), strict=True):
        verdict = judge(made, logit, prompt=prompt)
        assert verdict.probability == calibration.probability(logit)
    # z(-0.2) = 0.5 - 2.5 * 0.2 = 0, where P(unsafe) is the default's 0.5.
    assert made.self_test.passed
    assert judge(made, -0.2 + 1e-9).action == "refuse"
    assert judge(made, -0.2 - 1e-9).action == "pass"
    assert judge(made, 5.0).probability == pytest.approx(1 / (1 + math.exp(-0.75 - 0.5 * 3)))


def test_verdict_at_exactly_the_threshold_is_a_refusal():
    assert judge(ledger(), 0.0).action == "refuse"


@pytest.mark.parametrize(
    ("mode", "logit", "action", "decision"),
    [
        ("observe", 2.0, "pass", "refuse"),
        ("observe", -2.0, "pass", "pass"),
        ("check", 2.0, "checked", "refuse"),
        ("check", -2.0, "checked", "pass"),
        ("enforce", 2.0, "refuse", "refuse"),
    ],
)
def test_modes(mode, logit, action, decision):
    order = Decision(policy="p", mode=mode, rules=(Rule(above=0.6, action="refuse"),))
    verdict = judge(ledger(), logit, directive=directive(order))
    assert (verdict.action, verdict.decision, verdict.mode, verdict.policy) == (action, decision, mode, "p")
    assert verdict.nonce is not None


def test_tag_is_reported_and_passes():
    order = Decision(policy="p", rules=(Rule(above=0.9, action="refuse"), Rule(above=0.3, action="tag")))
    assert judge(ledger(), 0.0, directive=directive(order)).action == "tag"


def test_directive_without_rules_passes_everything():
    assert judge(ledger(), 50.0, directive=directive(Decision(policy="p", rules=()))).action == "pass"


def test_missing_score_is_an_error():
    verdict = judge(ledger(), None)
    assert (verdict.action, verdict.reason, verdict.unsafe, verdict.read) == (
        "error",
        "no_score",
        True,
        "nothing",
    )


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_is_an_error(logit):
    assert judge(ledger(), logit).reason == "score_not_finite"


def test_denied_request_is_an_error_whatever_its_score():
    assert judge(ledger(), -50.0, denied="lora").reason == "lora"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "directive_malformed"),
        ("k1.e30.AAAA", "directive_bad_mac"),
        ("other.e30.AAAA", "directive_unknown_key"),
        (directive(REFUSE_AT_HALF, keys=Keyring.generate()), "directive_bad_mac"),
        (directive(REFUSE_AT_HALF, audience="there"), "directive_wrong_audience"),
    ],
)
def test_invalid_directive_is_an_error_even_for_a_harmless_prompt(text, reason):
    verdict = judge(ledger(), -50.0, directive=text)
    assert (verdict.action, verdict.reason) == ("error", reason)


def test_any_directive_is_invalid_without_a_key_file():
    assert (
        judge(ledger(keys=None), -50.0, directive=directive(REFUSE_AT_HALF)).reason == "directive_no_key_file"
    )


def test_before_the_self_test_everything_else_is_turned_away():
    made = ledger(armed=False)
    assert judge(made, -50.0).reason == "not_ready"
    assert judge(made, -50.0, directive=directive(Decision(policy="p", rules=()))).reason == "not_ready"


def test_self_test_prompt_that_scores_otherwise_keeps_the_engine_shut():
    made = ledger(armed=False)
    made.open("t0", prompt=PROMPTS[0], prompt_tokens=3, directive=None)
    assert made.judge("t0", 1.02).reason == "self_test_mismatch"
    assert not made.self_test.passed
    assert judge(made, -50.0).reason == "not_ready"


def test_self_test_prompts_are_ordinary_requests_afterwards():
    assert judge(ledger(), 3.0, prompt=PROMPTS[0]).action == "refuse"


def test_dtype_without_self_test_scores_does_not_start():
    with pytest.raises(GuardStartupError, match="serve with --dtype float32"):
        ledger(dtype="bfloat16")


def test_closing_forgets_everything():
    made = ledger()
    made.open("r", prompt=[1], prompt_tokens=1, directive=None)
    assert made.unjudged == {"r"}
    assert made.close("r") is None
    assert not made.unjudged
    assert len(made) == 0
    judge(made, 1.0)
    assert made.close("r").action == "refuse"
    assert made.close("r") is None
