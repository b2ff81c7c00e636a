"""Intervals and ranking figures: the few statistics that every table of this project uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, norm, rankdata

CONFIDENCE = 0.95


class Rate(NamedTuple):
    """A proportion with its 95 % interval."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The proportion itself; 0 of 0 is 0."""
        return self.hits / self.n if self.n else 0.0

    def document(self) -> dict[str, float]:
        """The form in which JSON files hold it."""
        return {"hits": self.hits, "n": self.n, "rate": self.value, "low": self.low, "high": self.high}


def wilson(count: int, n: int) -> Rate:
    """Wilson score interval: well behaved at proportions near 0 and 1, where tables of a guard live."""
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is not a proportion")
    return Rate(count, n, *wilson_ends(count / n if n else 0.0, n))


def wilson_ends(p: float, n: int) -> tuple[float, float]:
    """The ends of the Wilson interval of a share ``p`` that rests on ``n`` independent observations."""
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula is exact but for rounding.
    return 0.0 if p == 0 else float(centre - half), 1.0 if p == 1 else float(centre + half)


def clopper_pearson(count: int, n: int) -> Rate:
    """Exact binomial interval: never covers less than it claims, so promises are made with this one."""
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is not a proportion")
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, n - count + 1))
    high = 1.0 if count == n else float(beta.ppf(1 - tail, count + 1, n - count))
    return Rate(count, n, low, high)


def auroc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """P(score of a positive > score of a negative), ties counted half; None when a class is missing."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_interval(
    scores: NDArray[Any], positive: NDArray[np.bool_], *, resamples: int = 200, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the AUROC over prompts, resampled within each class; None like ``auroc``."""
    if auroc(scores, positive) is None:
        return None
    random = np.random.default_rng(seed)
    high, low = scores[positive], scores[~positive]
    labels = np.arange(len(scores)) < len(high)
    values = [
        auroc(np.concatenate([random.choice(high, len(high)), random.choice(low, len(low))]), labels)
        for _ in range(resamples)
    ]
    return percentiles(values)


def percentiles(values: Sequence[float | None] | NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped values ``[draws]``."""
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.percentile(np.array(values, dtype=np.float64), [tail, 100 - tail])
    return float(lower), float(upper)


def newcombe(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an AUROC by Newcombe's method 5 (Statistics in Medicine 25, 2006, 559-573).

    The counterpart of Wilson's for a rate: it has a width even where a sample is ranked without an error,
    of which every resample is ranked so too.
    """
    z, mean = float(norm.ppf(0.5 + CONFIDENCE / 2)), (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + mean * (1 - theta) / (2 - theta) + mean * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (positives * negatives)
        return float((area - theta) ** 2 - z * z * variance)

    # At an area of 0 or 1 the area itself solves it too, and is not the end that is meant.
    low = 0.0 if area <= 0 else float(brentq(excess, 0.0, min(area, 1 - 1e-9)))
    high = 1.0 if area >= 1 else float(brentq(excess, max(area, 1e-9), 1.0))
    return low, high
