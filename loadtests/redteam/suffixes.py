"""Suffixes that are searched for: words behind the request that push the probe's logit below its threshold.

One loop, two ways to propose. At random: a random token at a random place (random search, Andriushchenko et
al., arXiv 2404.02151). By gradient: a place at random, the token among those whose slope promises the deepest
fall (GCG, Zou et al., arXiv 2307.15043). Both see the logit, which no client is shown unless the policy says
so.

What is proposed is text in the end: a suffix whose tokens another tokenisation of the whole prompt would not
give back is never asked about.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from guard.prompts import Tokens
from loadtests.redteam.target import Target
from models.recipe.corpus import digest

Method = Literal["random", "gradient"]
_DRAWS = 50
"""Most proposals that are drawn for one that survives tokenisation."""


class Settings(NamedTuple):
    """How long a search goes on. A query is one text scored; a gradient costs one as well."""

    queries: int = 120
    """Most queries for one request."""
    length: int = 12
    """Tokens of the suffix."""
    batch: int = 8
    """Proposals of one step."""
    best: int = 64
    """Tokens of each place that a gradient proposes from."""
    margin: float = 0.5
    """A search ends when the logit lies this far below the threshold: beyond what rounding moves."""


class Found(NamedTuple):
    """What became of one request."""

    text: str
    """The request with its best suffix."""
    logit: float
    queries: int
    """Until it passed for the first time, or all of them."""
    passed: bool


@dataclass
class _State:
    request: str
    head: Tokens
    tail: Tokens
    draw: random.Random
    suffix: Tokens = ()
    logit: float = float("inf")
    queries: int = 0
    passed_at: int | None = None
    slopes: torch.Tensor | None = None
    """Tokens worth proposing, ``[length, best]``."""
    asked: set[Tokens] = field(default_factory=set)

    def prompt(self, suffix: Tokens) -> Tokens:
        return self.head + suffix + self.tail


def search(
    target: Target,
    requests: Sequence[str],
    cut: float,
    method: Method,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> list[Found]:
    """Look for a suffix for each request; those that the context cannot hold are returned as they are.

    ``cut`` is the logit at and above which a prompt is flagged. The same requests and seed give the same
    suffixes.
    """
    settings = settings or Settings()
    states = [_begin(target, request, settings, seed) for request in requests]
    active = [state for state in states if state.suffix]
    _ask(target, active, [[state.suffix] for state in active], cut)
    steps = -(-settings.queries // settings.batch)
    for _ in tqdm(range(steps), desc=f"{method} suffixes", disable=not progress):
        active = [s for s in active if s.logit >= cut - settings.margin and s.queries < settings.queries]
        if not active:
            break
        if method == "gradient":
            _look(target, active, settings)
        proposals = [_propose(target, state, method, settings) for state in active]
        _ask(target, active, proposals, cut)
    return [_result(target, state, cut) for state in states]


def survives(target: Target, request: str, prompt: Tokens, suffix: Tokens) -> bool:
    """Whether the request with the suffix, as text, becomes just these tokens again."""
    return target.encode(request + target.tokenizer.decode(suffix)) == prompt


def _begin(target: Target, request: str, settings: Settings, seed: int) -> _State:
    tokens = target.encode(request)
    (tail,) = (t for t in target.tails if tokens[len(tokens) - len(t) :] == t)
    state = _State(
        request, tokens[: len(tokens) - len(tail)], tail, random.Random(digest(f"{seed}:{request}"))
    )
    if len(tokens) + settings.length > target.longest:
        return state
    words = _vocabulary(target.tokenizer)
    for _ in range(_DRAWS * settings.length):
        suffix = tuple(state.draw.choice(words) for _ in range(settings.length))
        if survives(target, request, state.prompt(suffix), suffix):
            state.suffix = suffix
            break
    return state


def _propose(target: Target, state: _State, method: Method, settings: Settings) -> list[Tokens]:
    """Up to a batch of suffixes that differ from the best one in one token, and were not asked about."""
    words = _vocabulary(target.tokenizer)
    found: list[Tokens] = []
    for _ in range(_DRAWS * settings.batch):
        if len(found) == min(settings.batch, settings.queries - state.queries):
            break
        place = state.draw.randrange(settings.length)
        if method == "gradient":
            assert state.slopes is not None
            token = int(state.slopes[place, state.draw.randrange(state.slopes.shape[1])])
        else:
            token = state.draw.choice(words)
        suffix = (*state.suffix[:place], token, *state.suffix[place + 1 :])
        if suffix in state.asked or suffix in found:
            continue
        if survives(target, state.request, state.prompt(suffix), suffix):
            found.append(suffix)
    if not found:
        state.queries = settings.queries  # nothing is left to propose
    return found


def _look(target: Target, states: Sequence[_State], settings: Settings) -> None:
    """Rank tokens by the gradient at each state's best suffix."""
    slopes = target.gradients(
        [state.prompt(state.suffix) for state in states],
        [len(state.head) for state in states],
        settings.length,
    )
    words = _vocabulary(target.tokenizer)
    best = min(settings.best, len(words))
    barred = torch.ones(slopes.shape[-1], dtype=torch.bool)
    barred[list(words)] = False
    slopes[..., barred] = float("inf")
    for state, slope in zip(states, slopes, strict=True):
        state.slopes = slope.topk(best, largest=False).indices
        state.queries += 1


def _ask(target: Target, states: Sequence[_State], proposals: Sequence[Sequence[Tokens]], cut: float) -> None:
    """Score proposals and keep the best of each request."""
    flat = [(state, suffix) for state, each in zip(states, proposals, strict=True) for suffix in each]
    logits = target.logits([state.prompt(suffix) for state, suffix in flat])
    for (state, suffix), logit in zip(flat, logits.tolist(), strict=True):
        state.queries += 1
        state.asked.add(suffix)
        if logit < state.logit:
            state.suffix, state.logit = suffix, logit
        if logit < cut and state.passed_at is None:
            state.passed_at = state.queries


def _result(target: Target, state: _State, cut: float) -> Found:
    if not state.suffix:
        return Found(state.request, float("inf"), 0, False)
    text = state.request + target.tokenizer.decode(state.suffix)
    return Found(text, state.logit, state.passed_at or state.queries, state.passed_at is not None)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> tuple[int, ...]:
    """Tokens a suffix may hold: printable ASCII, none of the special ones."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return tuple(
        index
        for index, text in enumerate(texts)
        if index not in special and text and text.isascii() and text.isprintable()
    )
