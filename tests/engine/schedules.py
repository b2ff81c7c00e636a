"""What happens to a simulated engine: who asks for what, when, and what interferes. Needs no vLLM."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

from hypothesis import strategies as st

from guard.verdict import Action, Decision, Rule

Order = Literal[
    *("none", "enforce", "lenient", "tag", "observe", "check", "open", "forged"),
    *("patch", "other", "stubborn", "begin"),
]
"""The directive that a request carries.

``lenient`` enforces and lets prompts of any shape through.
``patch`` and ``other`` are patched in two ways and then safe, ``stubborn`` patched as ``patch`` and still
unsafe, ``begin`` begins with given words.
"""
SLOTS: dict[Order, int] = {"patch": 1, "other": 3}
"""Numbers of their patches in the bundle."""
Score = Literal["low", "high", "nan", "missing"]
LOGIT = 20.0
"""Far from every threshold."""
LONGEST = 300
TAIL = 0
"""The token that ends an accepted prompt, if there is another before it."""
PREFIX = (7, 8, 9)
"""Tokens of those words."""
PATCHED = 500
"""Times the number of the patch, added to a request's number in the tokens of a patched model."""
DECISIONS: dict[Order, Decision] = {
    "enforce": Decision(policy="p", mode="enforce", rules=(Rule(above=0.5, action="refuse"),)),
    "lenient": Decision(policy="p", rules=(Rule(above=0.5, action="refuse"),), unscored_shape="pass"),
    "tag": Decision(policy="p", rules=(Rule(above=0.5, action="tag"),)),
    "observe": Decision(policy="p", mode="observe", rules=(Rule(above=0.5, action="refuse"),)),
    "check": Decision(policy="p", mode="check", rules=(Rule(above=0.5, action="refuse"),)),
    "open": Decision(policy="p", mode="enforce", rules=()),
    "patch": Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="zero"),)),
    "other": Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="half"),)),
    "stubborn": Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="zero"),)),
    "begin": Decision(policy="p", rules=(Rule(above=0.5, action="patch", patch="words"),)),
}
_SHARED = [random.Random(7).randrange(256) for _ in range(LONGEST)]


@dataclass(frozen=True)
class Asked:
    """One request."""

    length: int = 20
    """Prompt tokens."""
    shared: int = 0
    """How many of them, at most, begin the prompts of others, too."""
    order: Order = "none"
    score: Score = "low"
    max_tokens: int = 8
    arrives: int = 0
    """Step before which it is added."""
    leaves: int | None = None
    """Step in which its client goes away."""
    leaves_late: bool = False
    """Whether that is while the step's output is awaited, or before the next step is scheduled."""
    priority: int = 0
    stream: bool = False
    logprobs: int | None = None
    """How many alternatives it wants beside each token, of its prompt and of its answer."""
    odd: bool = False
    """Whether its prompt ends otherwise than the bundle says."""
    early: bool = False
    """Whether it comes before the self-test."""

    def prompt(self, number: int) -> list[int]:
        own = random.Random(number)
        shared = _SHARED[: min(self.shared, self.length)]
        tokens = shared + [own.randrange(256) for _ in range(self.length - len(shared))]
        return [*tokens[:-1], max(1, tokens[-1]) if self.odd else TAIL]

    @property
    def unscored(self) -> bool:
        """Whether the probe was not fitted on prompts that end like this."""
        return self.odd or self.length == 1

    def logit(self, number: int) -> float | None:
        """A score of its own, so that a verdict shows whose it is."""
        own = LOGIT + number / 4
        return {"low": -own, "high": own, "nan": math.nan, "missing": None}[self.score]

    @property
    def action(self) -> Action:
        """The verdict that it must get."""
        if self.early or self.order == "forged" or self.score in ("nan", "missing"):
            return "error"
        if self.order == "check":
            return "checked"
        if self.unscored and self.order not in ("lenient", "observe"):
            return "refuse"
        if self.score != "high" or self.order in ("open", "observe"):
            return "pass"
        if self.order == "tag":
            return "tag"
        return "patch" if self.order in (*SLOTS, "begin") else "refuse"

    def answer(self, number: int) -> list[int]:
        """The tokens that the model gives when it runs alone."""
        first = list(PREFIX) if self.action == "patch" and self.order == "begin" else []
        whose = number + PATCHED * (SLOTS.get(self.order, 0) if self.action == "patch" else 0)
        positions = range(self.length + len(first), self.length + self.max_tokens)
        return [*first, *(token(whose, position) for position in positions)][: self.max_tokens]


@dataclass(frozen=True)
class Schedule:
    """Requests in the order in which they are added, and steps at which all running ones are preempted."""

    asked: tuple[Asked, ...]
    resets: tuple[tuple[int, bool], ...] = ()
    """Steps, and whether while the step's output is awaited."""
    seed: int = 0
    """Of the drafts that are accepted."""


def token(number: int, position: int) -> int:
    """The token of request ``number`` at ``position``: no two are alike; none is a prompt's or the end."""
    return 1000 * (number + 1) + position


def crowd(count: int, seed: int) -> Schedule:
    """``count`` requests over some hundred steps, a fifth of which are left by their clients.

    Up to 400: beyond that, tokens of one request would be those of another one's patched model.
    """
    rng = random.Random(seed)
    last = 4 * count
    asked = []
    for _ in range(count):
        arrives = rng.randrange(last)
        asked.append(
            Asked(
                length=rng.choice((1, 16, 33, 64, LONGEST, *(rng.randint(2, 120) for _ in range(20)))),
                shared=rng.choice((0, 0, 40, LONGEST)),
                # One order alone ends in a tag, the others in what two or more end in.
                order=rng.choice((*get_args(Order), "tag", "check")),
                score=rng.choice(("low", "low", "low", "high", "high", "high", "nan", "missing")),
                max_tokens=rng.randint(1, 30),
                arrives=arrives,
                leaves=rng.choice((None,) * 4 + (arrives + rng.randrange(30),)),
                leaves_late=rng.random() < 0.5,
                priority=rng.randrange(3),
                stream=rng.random() < 0.5,
                logprobs=rng.choice((None, None, 0, 3)),
                odd=rng.random() < 0.2,
            )
        )
    resets = tuple((rng.randrange(last), rng.random() < 0.5) for _ in range(count // 40))
    return Schedule(tuple(asked), resets, seed)


STEPS = st.integers(0, 40)
ASKED = st.builds(
    Asked,
    length=st.one_of(st.integers(1, LONGEST), st.sampled_from((1, 15, 16, 17, 33, 48, 64, 65, 128, LONGEST))),
    shared=st.sampled_from((0, 0, 40, LONGEST)),
    order=st.sampled_from(
        (
            "none",
            "none",
            "enforce",
            "lenient",
            "tag",
            "observe",
            "check",
            "open",
            "forged",
            "patch",
            "other",
            "stubborn",
            "begin",
        )
    ),
    score=st.sampled_from(("low", "low", "low", "high", "high", "nan", "missing")),
    max_tokens=st.integers(1, 40),
    arrives=st.one_of(st.just(0), STEPS),
    leaves=st.one_of(st.none(), STEPS),
    leaves_late=st.booleans(),
    priority=st.integers(0, 2),
    stream=st.booleans(),
    logprobs=st.sampled_from((None, None, 0, 3)),
    odd=st.sampled_from((False,) * 4 + (True,)),
    early=st.sampled_from((False,) * 9 + (True,)),
)
SCHEDULES = st.builds(
    Schedule,
    asked=st.lists(ASKED, min_size=3, max_size=14).map(tuple),
    resets=st.lists(st.tuples(STEPS, st.booleans()), max_size=3).map(tuple),
    seed=st.integers(0, 99),
)
