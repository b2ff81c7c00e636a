from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.sealed import Keyring
from guard.verdict import SEVERITY, Decision, Directive, DirectiveError, Rule, Verdict, VerdictError

RING = Keyring((("k", b"k" * 32),))
PLAIN = Decision(policy="p", rules=(Rule(above=0.5, action="refuse"),))


def verdict(**changes: Any) -> Verdict:
    document = {
        "action": "pass",
        "decision": "pass",
        "probability": 0.25,
        "logit": -1.0,
        "threshold": 0.5,
        "unsafe": False,
        "mode": "enforce",
        "policy": "p",
        "bundle": "b",
        "read": "prompt_last",
        "prompt_tokens": 3,
        "nonce": "n" * 24,
        **changes,
    }
    return Verdict.model_validate(document)


verdicts = st.builds(
    verdict, action=st.sampled_from(SEVERITY), probability=st.one_of(st.none(), st.floats(0, 1))
)


def test_the_first_matching_rule_decides() -> None:
    decision = Decision(
        policy="p",
        rules=(
            Rule(above=0.9, action="refuse"),
            Rule(above=0.7, action="pass"),
            Rule(above=0.3, action="tag"),
        ),
    )
    assert [decision.decide(p) for p in (0.95, 0.9, 0.8, 0.3, 0.29)] == [
        "refuse",
        "refuse",
        "pass",
        "tag",
        "pass",
    ]
    assert decision.threshold == 0.9


def test_without_rules_everything_passes() -> None:
    decision = Decision(policy="p", rules=())
    assert decision.decide(1.0) == "pass"
    assert decision.threshold is None


def test_the_threshold_is_the_lowest_that_refuses() -> None:
    rules = (
        Rule(above=0.9, action="refuse"),
        Rule(above=0.4, action="refuse"),
        Rule(above=0.1, action="tag"),
    )
    assert Decision(policy="p", rules=rules).threshold == 0.4


@given(st.lists(verdicts, min_size=1, max_size=6), st.randoms())
def test_the_binding_verdict_does_not_depend_on_order(siblings: list[Verdict], random: Any) -> None:
    def worst(group: list[Verdict]) -> tuple[str, float | None]:
        result = group[0]
        for other in group[1:]:
            result = result.worse_of(other)
        return result.action, result.probability if result.probability is not None else 1.0

    shuffled = list(siblings)
    random.shuffle(shuffled)
    assert worst(siblings) == worst(shuffled)
    assert worst(siblings)[0] == max((v.action for v in siblings), key=SEVERITY.index)


@pytest.mark.parametrize(("milder", "worse"), [*pairwise(SEVERITY)])
def test_severity_comes_before_probability(milder: Any, worse: Any) -> None:
    first, second = verdict(action=milder, probability=0.99), verdict(action=worse, probability=0.01)
    assert first.worse_of(second) is second
    assert second.worse_of(first) is second


def test_no_score_is_worse_than_any_score() -> None:
    first, second = verdict(probability=0.99), verdict(probability=None)
    assert first.worse_of(second) is second


def test_a_directive_opens_for_its_audience_only() -> None:
    directive = Directive.issue(PLAIN, audience="engine-1", body=b"{}", siblings=2, lifetime=5)
    sealed = directive.seal(RING)
    assert Directive.open(sealed, RING, audience="engine-1") == directive
    assert directive.body_sha256 == hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(DirectiveError, match="wrong_audience"):
        Directive.open(sealed, RING, audience="engine-2")


def test_two_directives_never_share_a_nonce() -> None:
    made = {Directive.issue(PLAIN, audience="e", body=b"").nonce for _ in range(100)}
    assert len(made) == 100


def test_a_verdict_belongs_to_one_directive() -> None:
    sealed = verdict().seal(RING)
    assert Verdict.open(sealed, RING, nonce="n" * 24) == verdict()
    with pytest.raises(VerdictError, match="wrong_nonce"):
        Verdict.open(sealed, RING, nonce="m" * 24)


def test_a_verdict_without_a_nonce_answers_no_directive() -> None:
    with pytest.raises(VerdictError, match="wrong_nonce"):
        Verdict.open(verdict(nonce=None).seal(RING), RING, nonce="")


def test_a_directive_replayed_as_a_verdict_is_refused() -> None:
    directive = Directive.issue(PLAIN, audience="e", body=b"")
    with pytest.raises(VerdictError, match="bad_mac"):
        Verdict.open(directive.seal(RING), RING, nonce=directive.nonce)
    with pytest.raises(DirectiveError, match="bad_mac"):
        Directive.open(verdict().seal(RING), RING, audience="e")


@pytest.mark.parametrize("payload", [b"{}", b"not json", b'{"version": 2}', b"[]"])
def test_a_signed_payload_of_another_shape_is_malformed(payload: bytes) -> None:
    with pytest.raises(VerdictError, match="malformed"):
        Verdict.open(RING.seal("verdict", payload), RING, nonce="n")
    with pytest.raises(DirectiveError, match="malformed"):
        Directive.open(RING.seal("directive", payload), RING, audience="e")


@pytest.mark.parametrize(
    "changes",
    [{"probability": 1.5}, {"probability": float("nan")}, {"extra": 1}, {"action": "maybe"}, {"version": 2}],
)
def test_an_impossible_verdict_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        verdict(**changes)


def test_a_verdict_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        verdict().action = "refuse"
