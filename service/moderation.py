"""OpenAI's moderation results, and its ``moderation`` field on chat requests.

How one probability becomes thirteen categories: it does not. The probe says *whether* the answer to a text
would be unsafe (or the text is harmful; the bundle says which), never *of what kind*. So

- ``flagged`` is what the caller's policy says about the score: anything but ``pass``;
- OpenAI's thirteen categories are all there, for SDKs need them, as ``false`` and ``0.0`` with an empty list
  in ``category_applied_input_types``: nothing was looked at for them;
- a further category ``unsafe`` holds the finding, and its P(unsafe) as score if the policy exposes scores.
  Without that right its score is ``1.0`` or ``0.0``, which tells no more than ``flagged`` does.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from guard.verdict import Decision, Rule
from service.fields import Strict

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
UNSAFE = "unsafe"


class InputPolicy(Strict):
    """What to do about the input."""

    mode: Literal["score", "block"]


class ModerationPolicy(Strict):
    """For the input only: this guard judges prompts, not answers, so that ``output`` is refused."""

    input: InputPolicy | None = None


class Moderation(Strict):
    """Asks for the finding in the answer, and may ask to block what the policy only flags.

    It narrows what the policy says and never widens it: ``score`` does not unblock anything.
    """

    model: str = Field(min_length=1, max_length=200)
    """Whatever it names, the guard in the engine is what judges."""
    policy: ModerationPolicy | None = None

    @property
    def blocks(self) -> bool:
        """Whether what is flagged must not be answered."""
        return self.policy is not None and self.policy.input is not None and self.policy.input.mode == "block"


def blocking(decision: Decision) -> Decision:
    """The same rules, enforced, with everything refused that they flag.

    It is about the input: answers that were only observed as they grow are not stopped for it.
    """
    rules = tuple(
        Rule(above=rule.above, action="refuse") if rule.action in ("tag", "patch") else rule
        for rule in decision.rules
    )
    monitor = decision.monitor if decision.mode == "enforce" else None
    return decision.model_copy(update={"mode": "enforce", "rules": rules, "monitor": monitor})


def result(flagged: bool, probability: float | None) -> dict[str, Any]:
    """One result. ``probability`` None: the caller may not see it."""
    score = probability if probability is not None else float(flagged)
    return {
        "flagged": flagged,
        "categories": dict.fromkeys(CATEGORIES, False) | {UNSAFE: flagged},
        "category_scores": dict.fromkeys(CATEGORIES, 0.0) | {UNSAFE: score},
        "category_applied_input_types": {name: [] for name in CATEGORIES} | {UNSAFE: ["text"]},
    }


def report(model: str, flagged: bool | None, probability: float | None) -> dict[str, Any]:
    """The member ``moderation`` of an answer. ``flagged`` None: it was answered without a verdict."""
    if flagged is None:
        prompt = _error("guard_no_verdict", "The request was not judged.")
    else:
        found = result(flagged, probability) | {"model": model, "type": "moderation_result"}
        prompt = {"type": "moderation_results", "model": model, "results": [found]}
    answer = _error("not_available", "The results are about prompts, not about answers.")
    return {"input": prompt, "output": answer}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message}
