import contextlib
import time

import pytest

from guard.engine.exchange import Admission, Exchange
from guard.sealed import Keyring
from guard.verdict import Directive, DirectiveError, Verdict
from tests.engine.cards import REFUSE_AT_HALF

KEYS = Keyring.generate()


def verdict(action: str, probability: float | None = 0.1) -> Verdict:
    return Verdict(
        action=action,
        decision=None,
        probability=probability,
        logit=None,
        threshold=0.5,
        unsafe=action != "pass",
        mode="enforce",
        policy="p",
        bundle="b",
        read="prompt_last",
        prompt_tokens=3,
    )


def exchange(siblings: int) -> Exchange:
    directive = Directive.issue(REFUSE_AT_HALF, audience="here", body=b"{}", siblings=siblings)
    made = Exchange("gateway", directive, "sealed")
    for i in range(siblings):
        made.register(f"r{i}", prompt_id="p", prompt_tokens=3)
    return made


def test_pass_binds_only_when_every_sibling_is_judged():
    made = exchange(2)
    made.record("r0", verdict("pass", 0.2))
    assert made.binding is None
    made.record("r1", verdict("pass", 0.3))
    assert made.decided.is_set()
    assert (made.binding.action, made.binding.probability) == ("pass", 0.3)


@pytest.mark.parametrize("action", ["refuse", "error"])
def test_one_stopped_sibling_binds_all_at_once(action):
    made = exchange(3)
    made.record("r2", verdict(action))
    assert made.binding.action == action
    made.record("r0", verdict("pass"))
    assert made.binding.action == action


def test_escalation_waits_for_siblings_that_may_be_worse():
    for last, bound in (("pass", "escalate"), ("refuse", "refuse")):
        made = exchange(2)
        made.record("r0", verdict("escalate", 0.6))
        assert made.binding is None
        made.record("r1", verdict(last, 0.2 if last == "pass" else 0.9))
        assert made.binding.action == bound


def test_prompt_tokens_count_each_prompt_once():
    made = exchange(2)
    made.register("r1", prompt_id="q", prompt_tokens=4)
    made.record("r0", verdict("pass"))
    made.record("r1", verdict("pass"))
    assert made.binding.prompt_tokens == 7


def test_verdict_counts_once():
    made = exchange(2)
    assert made.record("r0", verdict("pass"))
    assert not made.record("r0", verdict("pass"))
    assert made.binding is None


def test_more_siblings_than_the_directive_allows_is_an_error():
    made = exchange(1)
    made.register("extra", prompt_id="x", prompt_tokens=1)
    made.record("extra", verdict("pass"))
    assert (made.binding.action, made.binding.reason) == ("error", "more_siblings_than_directed")


class TestAdmission:
    def test_valid_directive_is_admitted_once(self):
        admission, sealed = Admission(KEYS, "here"), self.sealed()
        assert admission.admit(sealed, b"{}").decision == REFUSE_AT_HALF
        assert self.reason(admission, sealed, b"{}") == "replayed"

    def test_other_body_is_refused_and_does_not_spend_the_nonce(self):
        admission, sealed = Admission(KEYS, "here"), self.sealed()
        assert self.reason(admission, sealed, b'{"n":2}') == "wrong_body"
        admission.admit(sealed, b"{}")

    def test_expired_directive_is_refused(self):
        admission, sealed = Admission(KEYS, "here"), self.sealed(lifetime=-1.0)
        assert self.reason(admission, sealed, b"{}") == "expired"

    def test_wrong_audience_key_and_purpose_are_refused(self):
        assert self.reason(Admission(KEYS, "there"), self.sealed(), b"{}") == "wrong_audience"
        assert self.reason(Admission(Keyring.generate(), "here"), self.sealed(), b"{}") == "bad_mac"
        assert self.reason(Admission(None, "here"), self.sealed(), b"{}") == "no_key_file"
        as_verdict = KEYS.seal("verdict", b"{}")
        assert self.reason(Admission(KEYS, "here"), as_verdict, b"{}") == "bad_mac"

    def test_expired_nonces_are_forgotten(self):
        admission = Admission(KEYS, "here")
        sealed = self.sealed(lifetime=10.0)
        directive = admission.admit(sealed, b"{}")
        later = directive.expires + 1.0
        assert self.reason(admission, sealed, b"{}", later) == "expired"
        fresh = Directive.issue(REFUSE_AT_HALF, audience="here", body=b"{}", lifetime=100.0).seal(KEYS)
        admission.admit(fresh, b"{}", later)
        assert len(admission._seen) == 1

    @pytest.mark.parametrize("jumps", [(-3600.0,), (3600.0, 0.0), (3600.0, -3600.0)], ids=str)
    def test_a_clock_that_jumps_makes_no_spent_directive_fresh(self, jumps, monkeypatch):
        admission, sealed = Admission(KEYS, "here"), self.sealed()
        admission.admit(sealed, b"{}")
        wall = time.time
        for jump in jumps:
            monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
            fresh = self.sealed()
            with contextlib.suppress(DirectiveError):
                admission.admit(fresh, b"{}")  # forgets what it thinks has expired
        assert self.reason(admission, sealed, b"{}") in ("replayed", "expired")

    def test_a_directive_does_not_live_longer_because_a_clock_was_set_back(self, monkeypatch):
        admission, sealed = Admission(KEYS, "here"), self.sealed(lifetime=30.0)
        wall, steady = time.time(), time.monotonic()
        monkeypatch.setattr(time, "time", lambda: wall - 3600.0)
        monkeypatch.setattr(time, "monotonic", lambda: steady + 31.0)
        assert self.reason(admission, sealed, b"{}") == "expired"

    @staticmethod
    def sealed(lifetime: float = 30.0) -> str:
        return Directive.issue(REFUSE_AT_HALF, audience="here", body=b"{}", lifetime=lifetime).seal(KEYS)

    @staticmethod
    def reason(admission: Admission, sealed: str, body: bytes, now: float | None = None) -> str:
        with pytest.raises(DirectiveError) as caught:
            admission.admit(sealed, body, now)
        return caught.value.reason
