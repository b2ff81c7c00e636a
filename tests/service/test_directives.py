import hashlib
from typing import Any

import pytest

from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Rule, Verdict, VerdictError
from service.directives import Order

KEYS = Keyring.generate()
ENFORCE = Decision(policy="p", rules=(Rule(above=0.8, action="refuse"), Rule(above=0.4, action="tag")))
OBSERVE = ENFORCE.model_copy(update={"mode": "observe"})
CHECK = ENFORCE.model_copy(update={"mode": "check"})


def issue(decision: Decision = ENFORCE) -> Order:
    return Order.issue(decision, KEYS, audience="a", body=b"{}", siblings=3, lifetime=5)


def verdict(order: Order, **changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "action": "pass",
        "decision": "pass",
        "probability": 0.1,
        "logit": 0.0,
        "threshold": 0.8,
        "unsafe": False,
        "mode": order.decision.mode,
        "policy": "p",
        "bundle": "b",
        "read": "prompt_last",
        "prompt_tokens": 1,
        "nonce": order.nonce,
    }
    return Verdict(**(values | changes))


def reason(order: Order, header: str | None) -> str:
    with pytest.raises(VerdictError) as caught:
        order.verify(header, KEYS)
    return caught.value.reason


def test_the_directive_binds_body_audience_siblings_and_decision() -> None:
    order = issue()
    directive = Directive.open(order.sealed, KEYS, audience="a")
    assert directive.body_sha256 == hashlib.sha256(b"{}").hexdigest()
    assert (directive.siblings, directive.decision, directive.nonce) == (3, ENFORCE, order.nonce)


def test_no_two_orders_share_a_nonce() -> None:
    assert len({issue().nonce for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("decision", "changes"),
    [
        (ENFORCE, {}),
        (ENFORCE, {"probability": 0.5, "action": "tag"}),
        (ENFORCE, {"probability": 0.8, "action": "refuse"}),
        (ENFORCE, {"probability": None, "action": "error", "decision": None, "read": "nothing"}),
        (OBSERVE, {"probability": 0.9, "decision": "refuse"}),
        (CHECK, {"probability": 0.9, "decision": "refuse", "action": "checked"}),
        (CHECK, {"probability": 0.1, "action": "checked"}),
    ],
)
def test_a_verdict_that_answers_the_order_is_believed(decision: Decision, changes: dict[str, Any]) -> None:
    order = issue(decision)
    sent = verdict(order, **changes)
    assert order.verify(sent.seal(KEYS), KEYS) == sent


@pytest.mark.parametrize(
    ("decision", "changes", "why"),
    [
        (ENFORCE, {"nonce": "x" * 24}, "wrong_nonce"),
        (ENFORCE, {"nonce": None}, "wrong_nonce"),
        (ENFORCE, {"policy": "other"}, "other_order"),
        (ENFORCE, {"mode": "observe"}, "other_order"),
        (ENFORCE, {"probability": None}, "not_scored"),
        (ENFORCE, {"read": "nothing"}, "not_scored"),
        (ENFORCE, {"probability": 0.9}, "inconsistent"),
        (ENFORCE, {"probability": 0.5}, "inconsistent"),
        (ENFORCE, {"action": "checked"}, "inconsistent"),
        (OBSERVE, {"probability": 0.9, "action": "refuse"}, "inconsistent"),
        (CHECK, {}, "inconsistent"),
    ],
)
def test_a_verdict_that_does_not_is_not(decision: Decision, changes: dict[str, Any], why: str) -> None:
    order = issue(decision)
    assert reason(order, verdict(order, **changes).seal(KEYS)) == why


PATCH = Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="mean"),))
LENIENT = Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="mean", still_unsafe="pass"),))
FLAGGED = {"probability": 0.7, "decision": "patch", "unsafe": True, "patch": "mean"}


@pytest.mark.parametrize(
    ("decision", "changes", "believed"),
    [
        (PATCH, {"action": "patch", "patched_probability": 0.1}, True),
        (PATCH, {"action": "refuse", "patched_probability": 0.6}, True),
        (PATCH, {"action": "patch", "patched_probability": 0.6}, False),
        (LENIENT, {"action": "patch", "patched_probability": 0.6}, True),
        (PATCH, {"action": "refuse", "patched_probability": 0.1}, False),
        (PATCH, {"action": "pass", "patched_probability": 0.1}, False),
        (PATCH, {"action": "patch", "patched_probability": 0.1, "patch": "other"}, False),
        (PATCH, {"action": "patch", "patched_probability": 0.1, "patch": None}, False),
        (PATCH, {"action": "patch"}, True),
        (PATCH, {"action": "refuse"}, True),
    ],
)
def test_a_patched_answer_is_believed_if_it_is_the_one_that_was_ordered(
    decision: Decision, changes: dict[str, Any], believed: bool
) -> None:
    order = issue(decision)
    sealed = verdict(order, **(FLAGGED | changes)).seal(KEYS)
    if believed:
        assert order.verify(sealed, KEYS).patch == "mean"
    else:
        assert reason(order, sealed) == "inconsistent"


def test_headers_that_are_no_verdict() -> None:
    order = issue()
    good = verdict(order).seal(KEYS)
    kid, payload, mac = good.split(".")
    assert reason(order, None) == "missing"
    assert reason(order, "") == "malformed"
    assert reason(order, f"{good}, {good}") == "malformed"  # how a header given twice arrives
    assert reason(order, f"{kid}.{payload}.{'A' * len(mac)}") == "bad_mac"
    assert reason(order, f"k9.{payload}.{mac}") == "unknown_key"
    assert reason(order, "a" * 10_000) == "too_long"
    assert reason(order, order.sealed) == "bad_mac"  # a directive is no verdict
    assert reason(order, verdict(order).seal(Keyring.generate())) == "bad_mac"
    assert reason(order, "é.é.é") == "malformed"
