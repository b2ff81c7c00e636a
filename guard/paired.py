"""Two scorers on the same prompts: tests that use the pairing, which two separate intervals throw away.

AUROC by DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988, 837-845); flags by McNemar's exact test;
every difference with a bootstrap interval in which both scorers see the same resamples. The two tests take
rows as independent; where rows share a request, only the bootstrap knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, rankdata

from guard.figures import RATES, Document, Scored, rate_name
from guard.ranking import Ranking
from guard.resample import Bootstrap
from guard.stats import CONFIDENCE, percentiles

BoolArray = NDArray[np.bool_]


class Difference(NamedTuple):
    """AUROC of the second scorer minus that of the first."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference; 1 where the two rank alike."""


def delong(first: NDArray[Any], second: NDArray[Any], positive: BoolArray) -> Difference | None:
    """DeLong's test on scores ``[n]``; None when a class has fewer than two prompts.

    Mid-rank form: the placement of a positive is the share of negatives below it, and the other way round.
    """
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        return None
    areas, of_positives, of_negatives = [], [], []
    for scores in (first, second):
        every = rankdata(scores)
        above = (every[positive] - rankdata(scores[positive])) / n
        below = 1 - (every[~positive] - rankdata(scores[~positive])) / m
        areas.append(float(above.mean()))
        of_positives.append(above)
        of_negatives.append(below)
    covariance = np.cov(of_positives) / m + np.cov(of_negatives) / n
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    value = areas[1] - areas[0]
    error = np.sqrt(max(variance, 0.0))
    half = float(norm.ppf(0.5 + CONFIDENCE / 2)) * error
    p_value = float(2 * norm.sf(abs(value) / error)) if error > 1e-12 else 1.0
    return Difference(value, float(value - half), float(value + half), p_value)


def mcnemar(first: BoolArray, second: BoolArray) -> Document:
    """Prompts that one of two scorers flags and the other does not, and the exact test of equal chances."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    apart = only_first + only_second
    return {
        "n": len(first),
        "a": float(first.mean()) if len(first) else None,
        "b": float(second.mean()) if len(second) else None,
        "only_a": only_first,
        "only_b": only_second,
        # Nothing that tells the two apart is no evidence of a difference.
        "p_value": float(binomtest(only_first, apart).pvalue) if apart else 1.0,
    }


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjustment: what each p-value is worth as one of so many."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.minimum(1.0, np.maximum.accumulate(np.array(p_values)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def differences(first: Scored, second: NDArray[Any], bootstrap: Bootstrap) -> Document | None:
    """Ranking figures of both scorers and of the second minus the first; None when a class is missing."""
    if first.positive.all() or not first.positive.any():
        return None
    orders = Ranking(first.scores, first.positive), Ranking(second, first.positive)
    names = ["auroc", "average_precision", *map(rate_name, RATES)]

    def values(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """``[scorers, figures, draws]``."""
        curves = [order.curve(weights) for order in orders]
        return np.array(
            [[c.auroc(), c.average_precision(), *(c.recall(rate) for rate in RATES)] for c in curves]
        )

    a, b = values(None)[:, :, 0]
    drawn = np.concatenate(
        [values(w) for w in bootstrap.weights(first.sources, first.positive, first.requests)], axis=2
    )
    found = {
        name: {
            "a": float(a[index]),
            "b": float(b[index]),
            "difference": float(b[index] - a[index]),
            "difference_interval": percentiles(drawn[1, index] - drawn[0, index]),
        }
        for index, name in enumerate(names)
    }
    document: Document = {"auroc": found["auroc"], "average_precision": found["average_precision"]}
    document["tpr_at_fpr"] = {name: found[name] for name in names[2:]}
    test = delong(first.scores, second, first.positive)
    if test is not None:
        document["auroc"] |= {"delong_interval": (test.low, test.high), "delong_p_value": test.p_value}
    return document
