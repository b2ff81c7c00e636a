"""The ledger: what the guard knows about each request in the engine, and the verdicts it gives.

Pure decision logic without vLLM. The scheduler opens an entry when a request arrives and closes it when the
request is freed, whatever the reason. Between the two exactly one verdict is given; a request whose first
token arrives before it has a score gets the verdict ``error``. A request that is to be patched is first sent
back (``Rerun``), and judged on the score of the patched run. Until the self-test has passed, every request
but the self-test's own prompts ends in ``error``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from guard.bundle import AdapterCard, GuardCard
from guard.engine.selftest import Expected, Key, SelfTestRun
from guard.engine.watch import Watch
from guard.prompts import ends_with_tail
from guard.sealed import Keyring
from guard.verdict import (
    UNSCORED_SHAPE,
    Action,
    Decision,
    Directive,
    DirectiveError,
    Rule,
    RuleAction,
    Verdict,
)

STOPPING: frozenset[Action] = frozenset({"refuse", "escalate", "checked", "error"})
"""Actions after which a request shows no token."""


@dataclass(frozen=True)
class Rerun:
    """Instead of a verdict: run the request again from its first token, under a patch."""

    patch: str


@dataclass
class Entry:
    """One request in the engine."""

    decision: Decision
    prompt_tokens: int
    nonce: str | None = None
    denied: str | None = None
    """Why this request may not be answered whatever its score, as a word for ``Verdict.reason``."""
    unscored_shape: bool = False
    """Whether the prompt ends as none of the bundle's prompts does."""
    fixed_form: bool = False
    """Whether the answer must follow a grammar, so that no words can be put before it."""
    self_test: Key | None = None
    """Which part of the self-test this is."""
    rerun: Rule | None = None
    """The rule that sent the request back to be patched."""
    first: tuple[float, float] | None = None
    """Logit and P(unsafe) of the run before that."""
    verdict: Verdict | None = None


class Ledger:
    """All requests of one engine core.

    ``unjudged`` holds the ids that have no verdict yet, ``slots`` the number of the patch for those that run
    under one: its place in the card, from 1. ``watched`` holds those whose answers are watched as they grow;
    ``watches`` says whether this engine can.
    """

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
        watches: bool = False,
    ) -> None:
        self._card = card
        self._watches = watches
        self._read: Literal["prompt", "prompt_last"] = "prompt" if card.probe == "sequence" else "prompt_last"
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
        self._tails = card.prompt_tails
        self._end = max(map(len, self._tails), default=0) + 1
        self._patches = {patch.name: (slot, patch) for slot, patch in enumerate(card.patches, start=1)}
        self.unjudged: set[str] = set()
        self.slots: dict[str, int] = {}
        self.watched: dict[str, Watch] = {}

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
        fixed_form: bool = False,
    ) -> None:
        """Enter a new request; ``denied`` names a reason to fail it closed. Never raises on bad input.

        ``adapter`` is the name of the LoRA adapter that it runs under.
        """
        entry = Entry(self._default, prompt_tokens, denied=denied, fixed_form=fixed_form)
        if prompt is not None and self._tails:
            entry.unscored_shape = not ends_with_tail(tuple(prompt[-self._end :]), self._tails)
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
        if (monitor := entry.decision.monitor) is not None and entry.decision.mode != "check":
            self.watched[request_id] = Watch(monitor, entry.nonce, stops=entry.decision.mode == "enforce")

    def judge(self, request_id: str, logit: float | None) -> Verdict | Rerun:
        """Give the one verdict of a request, or send it back. ``logit`` None means that no score came."""
        entry = self._entries[request_id]
        judged = self._judge(entry, logit)
        if isinstance(judged, Rerun):
            self.slots[request_id] = self._patches[judged.patch][0]
            return judged
        self.unjudged.discard(request_id)
        entry.verdict = judged
        if (watch := self.watched.get(request_id)) is not None:
            watch.armed = True
        return judged

    def verdict(self, request_id: str) -> Verdict | None:
        """The verdict of a request that has one."""
        entry = self._entries.get(request_id)
        return entry.verdict if entry else None

    def prefix(self, verdict: Verdict) -> tuple[int, ...]:
        """Tokens that the answer has to begin with; usually none."""
        if verdict.action != "patch" or verdict.patch is None:
            return ()
        return self._patches[verdict.patch][1].prefix_tokens

    def _judge(self, entry: Entry, logit: float | None) -> Verdict | Rerun:
        if entry.denied is not None:
            return self._error(entry, entry.denied)
        if logit is None:
            return self._error(entry, "no_score")
        if not math.isfinite(logit):
            return self._error(entry, "score_not_finite")
        if entry.self_test is not None and not self.self_test.record(entry.self_test, logit):
            return self._error(entry, "self_test_mismatch", logit)
        if entry.rerun is not None:
            return self._patched(entry, entry.rerun, logit)
        return self._scored(entry, logit)

    def close(self, request_id: str) -> Verdict | None:
        """Forget a request and return its verdict, if it had one. Harmless when it is not known."""
        self.unjudged.discard(request_id)
        self.slots.pop(request_id, None)
        self.watched.pop(request_id, None)
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
            if not entry.decision.patches <= self._patches.keys():
                entry.denied = "directive_unknown_patch"
            elif entry.decision.monitor is not None and not self._watches:
                entry.denied = "directive_no_monitor"

    def _scored(self, entry: Entry, logit: float) -> Verdict | Rerun:
        probability = self._card.calibration.probability(logit)
        refused = entry.decision.refuses(entry.unscored_shape)
        rule = None if refused else entry.decision.match(probability)
        decision: RuleAction = "refuse" if refused else rule.action if rule else "pass"
        patch = rule.patch if rule else None
        action: Action = decision
        if entry.decision.mode == "check":
            action = "checked"
        elif entry.decision.mode == "observe":
            action = "pass"
        elif rule is not None and patch is not None:
            if self._patches[patch][1].kind != "prefix":
                entry.rerun, entry.first = rule, (logit, probability)
                return Rerun(patch)
            if entry.fixed_form:
                action = "refuse"
        reason = UNSCORED_SHAPE if refused and action == "refuse" else None
        return self._verdict(entry, action, decision, logit, probability, patch, reason=reason)

    def _patched(self, entry: Entry, rule: Rule, logit: float) -> Verdict:
        """Of a run whose prompt was patched; the score that led to the patch stays the verdict's."""
        after = self._card.calibration.probability(logit)
        before, probability = entry.first or (logit, after)
        action = entry.decision.outcome(probability, after)
        return self._verdict(entry, action, "patch", before, probability, rule.patch, after)

    def _verdict(
        self,
        entry: Entry,
        action: Action,
        decision: RuleAction,
        logit: float,
        probability: float,
        patch: str | None,
        patched_probability: float | None = None,
        reason: str | None = None,
    ) -> Verdict:
        return Verdict(
            action=action,
            decision=decision,
            probability=probability,
            logit=logit,
            threshold=entry.decision.threshold,
            patch=patch,
            patched_probability=patched_probability,
            unsafe=decision != "pass",
            mode=entry.decision.mode,
            policy=entry.decision.policy,
            bundle=self._bundle,
            read=self._read,
            unscored_shape=entry.unscored_shape,
            prompt_tokens=entry.prompt_tokens,
            nonce=entry.nonce,
            reason=reason,
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
            read="nothing" if logit is None else self._read,
            unscored_shape=entry.unscored_shape,
            prompt_tokens=entry.prompt_tokens,
            nonce=entry.nonce,
            reason=reason,
        )


def _expected(adapter: AdapterCard) -> dict[str, Expected]:
    return {dtype: Expected(logits, adapter.tolerance[dtype]) for dtype, logits in adapter.self_test.items()}
