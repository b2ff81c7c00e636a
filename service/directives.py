"""What goes out with a request, and what must come back before anybody sees an answer."""

from __future__ import annotations

from dataclasses import dataclass

from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Verdict, VerdictError


@dataclass(frozen=True)
class Order:
    """A directive on its way, with what is needed to judge the verdict that answers it."""

    sealed: str
    nonce: str
    decision: Decision

    @classmethod
    def issue(
        cls, decision: Decision, keys: Keyring, *, audience: str, body: bytes, siblings: int, lifetime: float
    ) -> Order:
        """Order what ``decision`` says for exactly these bytes."""
        directive = Directive.issue(
            decision, audience=audience, body=body, siblings=siblings, lifetime=lifetime
        )
        return cls(directive.seal(keys), directive.nonce, decision)

    def verify(self, header: str | None, keys: Keyring) -> Verdict:
        """The verdict in a response header, if it answers this order.

        Beyond seal and nonce it must fit the order: the same policy and mode, an action that this mode can
        have, for an answer that is passed on, a score for which the rules really say so, and where the answer
        is to be watched, a probe that can. A genuine engine always fulfils this; it is checked because it
        costs nothing and an answer hangs on it.

        Raises VerdictError, whose reason labels ``guard_bypass_total``.
        """
        if header is None:
            raise VerdictError("missing")
        verdict = Verdict.open(header, keys, nonce=self.nonce)
        if (verdict.policy, verdict.mode) != (self.decision.policy, self.decision.mode):
            raise VerdictError("other_order")
        if verdict.action == "error":
            return verdict
        if verdict.probability is None or verdict.read == "nothing":
            raise VerdictError("not_scored")
        if self.decision.monitor is not None and verdict.read != "prompt":
            raise VerdictError("inconsistent")  # a probe of the last token cannot watch the answer
        if verdict.action not in self._possible(verdict, verdict.probability):
            raise VerdictError("inconsistent")
        refused = self.decision.refuses(verdict.unscored_shape)
        rule = None if refused else self.decision.match(verdict.probability)
        if verdict.patch != (rule.patch if rule else None):
            raise VerdictError("inconsistent")
        return verdict

    def _possible(self, verdict: Verdict, probability: float) -> tuple[str, ...]:
        if self.decision.mode == "check":
            return ("checked",)
        if self.decision.mode == "observe":
            return ("pass",)
        patched = verdict.patched_probability
        outcome = self.decision.outcome(probability, patched, unscored_shape=verdict.unscored_shape)
        # Words cannot be put before an answer that must follow a grammar: it is refused.
        return ("patch", "refuse") if outcome == "patch" and patched is None else (outcome,)
