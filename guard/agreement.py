"""How far two judges agree beyond chance: Cohen's kappa with an interval, and the table behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.judges import Judgement
from guard.stats import percentiles, wilson

DRAWS = 1000


def kappa(cells: NDArray[Any]) -> NDArray[np.float64]:
    """Cohen's kappa of 2 × 2 tables ``[…, 4]``: both say unsafe, only the first, only the second, neither.

    NaN where both judges say the same of everything: chance alone then explains all there is.
    """
    both, first, second, neither = np.moveaxis(np.asarray(cells, dtype=np.float64), -1, 0)
    n = both + first + second + neither
    observed = (both + neither) / n
    expected = ((both + first) * (both + second) + (second + neither) * (first + neither)) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((observed - expected) / (1 - expected))


def agreement(
    first: Sequence[Judgement], second: Sequence[Judgement], requests: NDArray[np.int64], *, seed: int = 0
) -> dict[str, Any]:
    """What two judges say of the same answers; those that one of them could not judge are left out.

    The interval is a bootstrap over ``requests`` ``[n]``: the number of the request that each answer is to.
    """
    pairs = [
        (a.view == "unsafe", b.view == "unsafe", request)
        for a, b, request in zip(first, second, requests.tolist(), strict=True)
        if a.view is not None and b.view is not None
    ]
    document: dict[str, Any] = {"n": len(pairs), "not_judged_by_both": len(first) - len(pairs)}
    if not pairs:
        return {**document, "confusion": None, "agree": None, "kappa": None, "kappa_interval": None}
    a, b, request = (np.array(column) for column in zip(*pairs, strict=True))
    _, request = np.unique(request, return_inverse=True)
    cells = np.zeros((request.max() + 1, 4))
    np.add.at(cells, (request, 3 - 2 * a.astype(int) - b.astype(int)), 1)
    total = cells.sum(axis=0)
    random = np.random.default_rng(seed)
    drawn = np.array(
        [
            np.bincount(random.integers(len(cells), size=len(cells)), minlength=len(cells)) @ cells
            for _ in range(DRAWS)
        ]
    )
    value, spread = float(kappa(total)), kappa(drawn)
    spread = spread[~np.isnan(spread)]
    names = ("both_unsafe", "only_first_unsafe", "only_second_unsafe", "both_safe")
    return {
        **document,
        "confusion": {name: int(count) for name, count in zip(names, total, strict=True)},
        "agree": wilson(int(total[0] + total[3]), len(pairs)).document(),
        "kappa": None if np.isnan(value) else value,
        "kappa_interval": None if np.isnan(value) else percentiles(spread),
    }


def agreements(views: Mapping[str, Sequence[Judgement]], requests: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Every judge against every other."""
    return [
        {"first": a, "second": b, **agreement(views[a], views[b], requests)}
        for a, b in combinations(views, 2)
    ]
