"""Find a group of heads that matter together: the greedy search (Sahara) of Zhou et al.

One head may hide behind another that does the same. So the head whose ablation *on top of the group so far*
changes the model most joins the group, always against the unablated model, until the group is large enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from guard.locate.ablation import Head
from guard.locate.errors import LocateError
from guard.locate.unit_set import Float64Array


class Step(NamedTuple):
    """One step of the search."""

    head: Head
    """The head that joined."""
    score: float
    """How far the model with the whole group ablated is from the unablated one."""
    scores: Float64Array
    """That of every head on top of the group before it, ``[layers, heads]``; members are NaN."""


def search(score: Callable[[tuple[Head, ...]], Float64Array], size: int) -> list[Step]:
    """A group of ``size`` heads, one step a member.

    ``score`` takes a group and gives float64 ``[layers, heads]``: how far the model without the group and
    without this head is from the unablated model. Ties go to the first by layer and head.
    Raises LocateError when there are fewer heads, or a score is not a number.
    """
    steps: list[Step] = []
    for _ in range(size):
        group = tuple(step.head for step in steps)
        scores = score(group).copy()
        if not np.isfinite(scores).all():
            raise LocateError("a head's score is not finite")
        if len(group) >= scores.size:
            raise LocateError(f"a group of {size} heads was asked for; the model has {scores.size}")
        for member in group:
            scores[member] = np.nan
        layer, head = np.unravel_index(np.nanargmax(scores), scores.shape)
        steps.append(Step(Head(int(layer), int(head)), float(scores[layer, head]), scores))
    return steps
