"""The ledger: what the guard knows about each request in the engine, and the verdicts it gives.

Pure decision logic without vLLM. The scheduler opens an entry when a request arrives and closes it when the
request is freed, whatever the reason. Between the two exactly one verdict is given; a request whose first
token arrives before it has a score gets the verdict ``error``. Until the self-test has passed, every request
but the self-test's own prompts ends in ``error``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from guard.bundle import AdapterCard, GuardCard
from guard.engine.selftest import Expected, Key, SelfTestRun
from guard.sealed import Keyring
from guard.verdict import Action, Decision, Directive, DirectiveError, Verdict

STOPPING: frozenset[Action] = frozenset({"refuse", "checked", "error"})
"""Actions after which a request shows no token."""


@dataclass
class Entry:
    """One request in the engine."""

    decision: Decision
    prompt_tokens: int
    nonce: str | None = None
    denied: str | None = None
    """Why this request may not be answered whatever its score, as a word for ``Verdict.reason``."""
    self_test: Key | None = None
    """Which part of the self-test this is."""
    verdict: Verdict | None = None


class Ledger:
    """All requests of one engine core. ``unjudged`` holds the ids that have no verdict yet."""

    def __init__(
        self,
        card: GuardCard,
        *,
        bundle: str,
        dtype: str,
        default: Decision,
        keys: Keyring | None,
        audience: str,
        adapters: Sequence[str] = (),
    ) -> None:
        self._card = card
        self._bundle = bundle
        self._default = default
        self._keys = keys
        self._audience = audience
        self._entries: dict[str, Entry] = {}
        self._check = Decision(policy="self-test", mode="check", rules=())
        listed = {adapter.name: adapter for adapter in card.adapters}
        self.self_test = SelfTestRun(
            card.self_test, dtype, {name: _expected(listed[name]) for name in adapters}
        )
        self.unjudged: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def open(
        self,
        request_id: str,
        *,
        prompt: Sequence[int] | None,
        prompt_tokens: int,
        directive: str | None,
        denied: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Enter a new request; ``denied`` names a reason to fail it closed. Never raises on bad input.

        ``adapter`` is the name of the LoRA adapter that it runs under.
        """
        entry = Entry(self._default, prompt_tokens, denied=denied)
        if directive is not None:
            self._apply(entry, directive)
        if not self.self_test.passed and entry.denied is None:
            entry.self_test = self.self_test.key(prompt, adapter)
            if entry.self_test is None:
                entry.denied = "not_ready"
            else:
                entry.decision = self._check
        self._entries[request_id] = entry
        self.unjudged.add(request_id)

    def judge(self, request_id: str, logit: float | None) -> Verdict:
        """Give the one verdict of a request. ``logit`` None means that no score came."""
        entry = self._entries[request_id]
        self.unjudged.discard(request_id)
        if entry.denied is not None:
            verdict = self._error(entry, entry.denied)
        elif logit is None:
            verdict = self._error(entry, "no_score")
        elif not math.isfinite(logit):
            verdict = self._error(entry, "score_not_finite")
        elif entry.self_test is not None and not self.self_test.record(entry.self_test, logit):
            verdict = self._error(entry, "self_test_mismatch", logit)
        else:
            verdict = self._verdict(entry, logit)
        entry.verdict = verdict
        return verdict

    def close(self, request_id: str) -> Verdict | None:
        """Forget a request and return its verdict, if it had one. Harmless when it is not known."""
        self.unjudged.discard(request_id)
        entry = self._entries.pop(request_id, None)
        return entry.verdict if entry else None

    def _apply(self, entry: Entry, text: str) -> None:
        try:
            if self._keys is None:
                raise DirectiveError("no_key_file")
            directive = Directive.open(text, self._keys, audience=self._audience)
        except DirectiveError as error:
            entry.denied = f"directive_{error.reason}"
        else:
            entry.decision, entry.nonce = directive.decision, directive.nonce

    def _verdict(self, entry: Entry, logit: float) -> Verdict:
        probability = self._card.calibration.probability(logit)
        decision = entry.decision.decide(probability)
        action: Action = decision
        if entry.decision.mode == "check":
            action = "checked"
        elif entry.decision.mode == "observe":
            action = "pass"
        return Verdict(
            action=action,
            decision=decision,
            probability=probability,
            logit=logit,
            threshold=entry.decision.threshold,
            unsafe=decision != "pass",
            mode=entry.decision.mode,
            policy=entry.decision.policy,
            bundle=self._bundle,
            read="prompt_last",
            prompt_tokens=entry.prompt_tokens,
            nonce=entry.nonce,
        )

    def _error(self, entry: Entry, reason: str, logit: float | None = None) -> Verdict:
        return Verdict(
            action="error",
            decision=None,
            probability=None,
            logit=logit,
            threshold=entry.decision.threshold,
            unsafe=True,
            mode=entry.decision.mode,
            policy=entry.decision.policy,
            bundle=self._bundle,
            read="nothing" if logit is None else "prompt_last",
            prompt_tokens=entry.prompt_tokens,
            nonce=entry.nonce,
            reason=reason,
        )


def _expected(adapter: AdapterCard) -> dict[str, Expected]:
    return {dtype: Expected(logits, adapter.tolerance[dtype]) for dtype, logits in adapter.self_test.items()}
