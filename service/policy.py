"""Policies: what to do with a score, resolved against the thresholds of the bundle in force.

A rule that can never match is an error: when the file is read if both thresholds are of one kind, otherwise
as soon as the engine has told what its false-positive rates mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guard.monitor import MOST_DEBOUNCE, Monitor
from guard.verdict import Decision, EngineStatus, Rule, ShapeAction
from service.errors import ConfigError

DEFAULT_TEXT = "I can't help with that."


class PolicyError(ConfigError):
    """A policy file, or a policy against the bundle in force, makes no sense."""


class MisplacedError(ValueError):
    """Something is wrong at ``path``, relative to the object that is being checked."""

    def __init__(self, message: str, *path: int | str) -> None:
        super().__init__(message)
        self.path = path


class FileModel(BaseModel):
    """Base of everything in the policy file: no unknown key, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class AtRate(FileModel):
    """The bundle's threshold for a false-positive rate on benign prompts."""

    fpr: float = Field(gt=0.0, lt=1.0)


class PolicyRule(FileModel):
    """P(unsafe) at or above ``above`` leads to ``action``."""

    above: Annotated[float, Field(ge=0.0, le=1.0)] | AtRate
    action: Literal["pass", "tag", "patch", "escalate", "refuse"]
    judge: str | None = None
    """For ``escalate``: a name under ``judges``. May be left out where there is one judge only."""
    patch: str | None = None
    """For ``patch``: the name of one of the bundle's patches."""
    still_unsafe: Literal["refuse", "pass"] = "refuse"
    """For ``patch``: what happens when the patched run is flagged again."""

    @model_validator(mode="after")
    def _judge_belongs_to_escalate(self) -> PolicyRule:
        if self.judge is not None and self.action != "escalate":
            raise MisplacedError("only a rule with the action 'escalate' has a judge", "judge")
        return self

    @model_validator(mode="after")
    def _patch_belongs_to_patch(self) -> PolicyRule:
        if self.action == "patch" and self.patch is None:
            raise MisplacedError("'patch' needs the name of one of the bundle's patches, as in patch: NAME")
        for name in ("patch", "still_unsafe"):
            if name in self.model_fields_set and self.action != "patch":
                raise MisplacedError(f"only a rule with the action 'patch' has {name}", name)
        return self


class Refusal(FileModel):
    """What a client gets in place of an answer."""

    style: Literal["message", "content_filter", "azure", "error"] = "message"
    text: str = Field(default=DEFAULT_TEXT, min_length=1, max_length=4000)
    status: Literal[400, 403] = 403
    """HTTP status of the style ``error``."""

    @model_validator(mode="after")
    def _only_errors_have_a_status(self) -> Refusal:
        if "status" in self.model_fields_set and self.style != "error":
            raise MisplacedError("only the style 'error' has a status of its own", "status")
        return self


class PolicyMonitor(FileModel):
    """Stops answers as they grow: the bundle's threshold of its monitor for a rate and a debounce."""

    fpr: float = Field(gt=0.0, lt=1.0)
    """Share of benign answers that are stopped."""
    debounce: int = Field(ge=1, le=MOST_DEBOUNCE)
    """Tokens in a row that have to reach the threshold."""
    text: Literal["keep", "withdraw"] = "keep"
    """What becomes of the text so far. ``withdraw`` holds streams back until they have ended."""


class Policy(FileModel):
    """What to do with a score, and how to tell the client."""

    mode: Literal["enforce", "observe"] = "enforce"
    rules: Annotated[list[PolicyRule], Field(min_length=1, max_length=8)] | None = None
    """None: the rules of the engine's default decision."""
    unscored_shape: ShapeAction = "refuse"
    """What becomes of prompts that do not end as the chat template ends them: refused, or judged by the rules
    all the same, although the bundle's error rates do not hold for them."""
    on_missing_verdict: Literal["closed", "open"] = "closed"
    prefix_cache: Literal["shared", "tenant"] = "shared"
    """Who may find what a prompt has left in the engine's prefix cache, and see it by the time they wait:
    everybody, or requests of the same tenant under policies that say ``tenant``."""
    refusal: Refusal = Refusal()
    expose_score: bool = False
    monitor: PolicyMonitor | None = None
    """None: answers are not watched as they grow."""

    @model_validator(mode="after")
    def _every_rule_can_match(self) -> Policy:
        for later, rule in enumerate(self.rules or ()):
            for earlier, other in enumerate((self.rules or ())[:later]):
                if _hides(other.above, rule.above):
                    raise MisplacedError(_dead(later, earlier), "rules", later)
        return self

    @property
    def needs_bundle(self) -> bool:
        """Whether only a bundle's thresholds can tell what its rules mean."""
        return self.monitor is not None or any(isinstance(rule.above, AtRate) for rule in self.rules or ())

    def resolve(self, name: str, status: EngineStatus) -> Decision:
        """The engine's part of the policy, with every ``fpr`` replaced by this bundle's probability.

        Raises MisplacedError when the bundle has no such threshold or patch, or a rule can never match.
        """
        if self.rules is None:
            return self._decision(name, status.default.rules, status)
        rules = tuple(
            Rule(
                above=_probability(index, rule.above, status),
                action=rule.action,
                patch=_known(index, rule.patch, status),
                still_unsafe=rule.still_unsafe,
            )
            for index, rule in enumerate(self.rules)
        )
        for later, rule in enumerate(rules):
            for earlier, other in enumerate(rules[:later]):
                if other.above <= rule.above:
                    raise MisplacedError(
                        f"with the bundle in force, {_dead(later, earlier)}", "rules", later, "above"
                    )
        return self._decision(name, rules, status)

    def _decision(self, name: str, rules: tuple[Rule, ...], status: EngineStatus) -> Decision:
        return Decision(
            policy=name,
            mode=self.mode,
            rules=rules,
            unscored_shape=self.unscored_shape,
            monitor=_limit(self.monitor, status) if self.monitor is not None else None,
        )


@dataclass(frozen=True)
class BoundPolicy:
    """A policy as it is in force with one engine status."""

    name: str
    policy: Policy
    decision: Decision

    def judge(self, probability: float) -> str | None:
        """The judge that the rule for this score names; None when it leaves the choice to the file."""
        for rule, bound in zip(self.policy.rules or (), self.decision.rules, strict=False):
            if probability >= bound.above:
                return rule.judge
        return None


def judged_safe(decision: Decision) -> Decision:
    """What to order once a judge has found a request safe: whatever else the rules say stays in force."""
    rules = tuple(
        Rule(above=rule.above, action="pass") if rule.action == "escalate" else rule
        for rule in decision.rules
    )
    return decision.model_copy(update={"rules": rules})


def _known(index: int, patch: str | None, status: EngineStatus) -> str | None:
    if patch is not None and patch not in status.patches:
        there = ", ".join(status.patches) or "none"
        raise MisplacedError(
            f"the bundle in force has no patch {patch!r}; it has: {there}", "rules", index, "patch"
        )
    return patch


def _hides(earlier: float | AtRate, later: float | AtRate) -> bool:
    """Whether ``later`` is never reached; False when only the bundle can tell."""
    if isinstance(earlier, AtRate) and isinstance(later, AtRate):
        return earlier.fpr >= later.fpr  # a higher rate is a lower threshold
    if isinstance(earlier, AtRate) or isinstance(later, AtRate):
        return False
    return earlier <= later


def _dead(later: int, earlier: int) -> str:
    return (
        f"rule {later + 1} can never match, because rule {earlier + 1} matches everything that it would; "
        "put the higher threshold first"
    )


def _probability(index: int, above: float | AtRate, status: EngineStatus) -> float:
    if not isinstance(above, AtRate):
        return above
    for threshold in status.thresholds:
        if math.isclose(threshold.false_positive_rate, above.fpr, rel_tol=1e-9):
            return threshold.probability
    known = ", ".join(f"{threshold.false_positive_rate:g}" for threshold in status.thresholds) or "none"
    raise MisplacedError(
        f"fpr {above.fpr:g} is asked for, but the bundle in force has thresholds for: {known}",
        *("rules", index, "above"),
    )


def _limit(monitor: PolicyMonitor, status: EngineStatus) -> Monitor:
    for threshold in status.monitor:
        same_rate = math.isclose(threshold.false_positive_rate, monitor.fpr, rel_tol=1e-9)
        if same_rate and threshold.debounce == monitor.debounce:
            return Monitor(logit=threshold.logit, debounce=threshold.debounce)
    if not status.monitor:
        raise MisplacedError("the probe of the bundle in force watches no answers", "monitor")
    known = ", ".join(f"fpr {t.false_positive_rate:g} with debounce {t.debounce}" for t in status.monitor)
    raise MisplacedError(
        f"fpr {monitor.fpr:g} with debounce {monitor.debounce} is asked for, but the bundle in force has "
        f"monitor thresholds for: {known}",
        "monitor",
    )
