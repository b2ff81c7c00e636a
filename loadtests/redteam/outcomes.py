"""What an attack came to: counts of requests that got past the guard, and what the model made of them.

Documents hold counts and rates, never a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.judge import is_refusal
from guard.stats import wilson

Answers = Callable[[Sequence[str]], Sequence[str]]
"""The model's answers to texts, in order."""


class Outcome(NamedTuple):
    """One flagged request under one attack."""

    passed: bool
    """Whether some text of the attack was scored below the threshold."""
    queries: int
    """Texts scored until then, or all of them."""
    text: str
    """The text that passed, else the last one tried."""


def tried(candidates: Sequence[str], logits: NDArray[Any], cut: float) -> Outcome:
    """An attack that asks about one candidate after the other and stops at the first that passes.

    ``logits`` ``[candidates]`` are NaN for texts that the model's context cannot hold: nobody answers those,
    so they do not pass.
    """
    below = np.flatnonzero(logits < cut)
    if len(below):
        first = int(below[0])
        return Outcome(True, first + 1, candidates[first])
    return Outcome(False, len(candidates), candidates[-1])


def count(outcomes: Sequence[Outcome], answers: Answers | None, *, family: str) -> dict[str, Any]:
    """Rates over the requests of one attack, each with its 95 % Wilson interval.

    ``answered``: passed, and the model does not refuse by itself. What it then says is not judged: the lab
    models answer with stock sentences.
    """
    n = len(outcomes)
    passed = [outcome for outcome in outcomes if outcome.passed]
    document: dict[str, Any] = {
        "family": family,
        "n": n,
        "passed": wilson(len(passed), n).document(),
        "passed_at_once": wilson(sum(outcome.queries == 1 for outcome in passed), n).document(),
        "queries": int(sum(outcome.queries for outcome in outcomes)),
        "median_queries_of_passed": float(np.median([o.queries for o in passed])) if passed else None,
        "answered": None,
    }
    if answers is not None:
        said = answers([outcome.text for outcome in passed]) if passed else []
        document["answered"] = wilson(sum(not is_refusal(text) for text in said), n).document()
    return document
