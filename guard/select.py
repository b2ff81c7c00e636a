"""Choosing units with the one model alone: what an L1 fit keeps, and what it keeps again and again.

Columns are chosen by unit: a neuron is one column, a head is as many as it is wide, and comes whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import l1_min_c

from guard.probe import BoolArray, ProbeError, Standard, need_both
from guard.scorer import Float32Array

Selector = Callable[[Float32Array, BoolArray], NDArray[np.int64]]
"""From activations ``[n, features]`` and positives ``[n]`` to the columns to keep, ascending."""
Method = Literal["l1", "stability"]
IntArray = NDArray[np.int64]

SELECTION_ROWS = 5000
"""Most prompts that units are chosen on: the choice is stable long before, and takes most of a fit's time."""
SCREENED = 2000
"""Most columns that a fit of stability selection looks at: those whose means differ most between classes."""
PAIRS = 10
"""How often stability selection halves the prompts; each half is a fit."""
SHARE = 0.6
"""Least share of the halves in which a unit has to be kept."""
FALSE_SHARE = 0.05
"""Share of the units asked for that may be there by chance, by the bound of stability selection."""


def select_l1(
    features: Float32Array, positive: BoolArray, most: int, *, owner: IntArray | None = None, seed: int = 0
) -> IntArray:
    """Columns of the ``most`` units that an L1-regularised fit keeps first, ascending; all, if no more.

    ``owner`` ``[features]`` is the unit of each column, by default the column itself. The penalty is weakened
    step by step, each fit starting from the one before, until at least ``most`` units survive; of those the
    largest weights stay. Raises ProbeError when no unit ever does.
    """
    owner = np.arange(features.shape[1]) if owner is None else owner
    if len(np.unique(owner)) <= most:
        return np.arange(features.shape[1], dtype=np.int64)
    rows = np.arange(len(positive))
    if len(rows) > SELECTION_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, SELECTION_ROWS, replace=False))
    size = _kept(features[rows], positive[rows], most, owner, seed)
    return _columns(_largest(size, most), owner)


class Stable(NamedTuple):
    """What stability selection found."""

    columns: IntArray
    """Columns of the units that were kept in at least ``SHARE`` of the halves, ascending."""
    frequency: NDArray[np.float64]
    """For each unit number up to the largest, the share of halves in which it was kept."""
    a_fit: int
    """Units that each fit kept."""


def select_stable(
    features: Float32Array, positive: BoolArray, most: int, *, owner: IntArray | None = None, seed: int = 0
) -> Stable:
    """Stability selection (Meinshausen and Bühlmann 2010) over complementary halves (Shah and Samworth 2013).

    Each half keeps ``q`` units of an L1 path. Their bound on the number of units that are there by chance,
    q² / ((2 · SHARE − 1) · units), sets q so that at most ``FALSE_SHARE`` of ``most`` are. At most ``most``
    come back, those kept most often first. Raises ProbeError when no unit is kept often enough.
    """
    need_both(positive)
    owner = np.arange(features.shape[1]) if owner is None else owner
    units = len(np.unique(owner))
    allowed = max(1.0, FALSE_SHARE * most)
    a_fit = max(1, min(most, units, math.floor(math.sqrt((2 * SHARE - 1) * units * allowed))))
    random = np.random.default_rng(seed)
    kept = np.zeros(int(owner.max()) + 1)
    for _ in range(PAIRS):
        for rows in _halves(positive, random):
            here, target = features[rows], positive[rows]
            columns = _screened(here, target, owner)
            size = _kept(here[:, columns], target, a_fit, owner[columns], seed, len(kept))
            kept[_largest(size, a_fit)] += 1
    frequency = kept / (2 * PAIRS)
    chosen = np.argsort(-frequency, kind="stable")[:most]
    chosen = chosen[frequency[chosen] >= SHARE]
    if not len(chosen):
        raise ProbeError(
            f"no unit is kept in {SHARE:.0%} of the halves (the best in {frequency.max():.0%}); is there any "
            "signal in the data? 'l1' keeps units whether they are stable or not"
        )
    return Stable(_columns(chosen, owner), frequency, a_fit)


def selector(method: Method, most: int, owner: IntArray, seed: int) -> Selector:
    """A method as a function of prompts, for choosing anew wherever sources are left out."""
    if method == "l1":
        return lambda features, positive: select_l1(features, positive, most, owner=owner, seed=seed)
    return lambda features, positive: select_stable(features, positive, most, owner=owner, seed=seed).columns


def _kept(
    features: Float32Array, positive: BoolArray, wanted: int, owner: IntArray, seed: int, units: int = 0
) -> NDArray[np.float64]:
    """Weight of each unit, 0 for those not kept, at the first penalty at which ``wanted`` of them survive."""
    standardised = Standard.of(features).apply(features)
    solver = LogisticRegression(
        l1_ratio=1.0,
        solver="saga",
        class_weight="balanced",
        max_iter=15,
        warm_start=True,
        random_state=seed,
    )
    weakest = l1_min_c(standardised, positive, loss="log")
    size = np.zeros(max(units, int(owner.max()) + 1))
    for factor in np.geomspace(2, 2000, 16):
        with warnings.catch_warnings():
            # Which columns survive settles long before the coefficients do.
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.set_params(C=weakest * factor).fit(standardised, positive)
        size = np.sqrt(np.bincount(owner, solver.coef_[0].astype(np.float64) ** 2, len(size)))
        if np.count_nonzero(size) >= wanted:
            break
    return size


def _largest(size: NDArray[np.float64], most: int) -> IntArray:
    chosen = np.argsort(-size, kind="stable")[: min(most, np.count_nonzero(size))]
    if not len(chosen):
        raise ProbeError("the L1 fit keeps no unit; is there any signal in the data?")
    return chosen.astype(np.int64)


def _columns(chosen: IntArray, owner: IntArray) -> IntArray:
    return np.flatnonzero(np.isin(owner, chosen)).astype(np.int64)


def _halves(positive: BoolArray, random: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Two disjoint halves of at most ``SELECTION_ROWS`` prompts, each with half of both classes."""
    halves: tuple[list[IntArray], list[IntArray]] = ([], [])
    share = min(1.0, SELECTION_ROWS / len(positive))
    for label in (True, False):
        rows = random.permutation(np.flatnonzero(positive == label))
        half = max(1, int(len(rows) * share) // 2)
        halves[0].append(rows[:half])
        halves[1].append(rows[half : 2 * half])
    if not all(len(part) for part in halves[1]):
        raise ProbeError("stability selection halves the prompts; it needs two of each class at least")
    first, second = (np.sort(np.concatenate(parts)).astype(np.int64) for parts in halves)
    return first, second


def _screened(features: Float32Array, positive: BoolArray, owner: IntArray) -> IntArray:
    """Columns worth a fit: whole units, best first by the difference of means over the pooled deviation."""
    if features.shape[1] <= SCREENED:
        return np.arange(features.shape[1], dtype=np.int64)
    gap = features[positive].mean(0, dtype=np.float64) - features[~positive].mean(0, dtype=np.float64)
    spread = Standard.of(features).scale
    best = np.argsort(-np.abs(gap / spread), kind="stable")[:SCREENED]
    return _columns(np.unique(owner[best]), owner)
