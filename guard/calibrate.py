"""From raw logits to P(unsafe), and from a wanted false-positive rate to a threshold.

Platt scaling after Platt (1999) with the smoothed targets and the Newton iteration of Lin, Lin and Weng
(2007); isotonic regression after Zadrozny and Elkan (2002), interpolated between the centres of its steps
(Oron and Flournoy 2017) so that it always rises. Both classes weigh the same, so P(unsafe) is the probability
at even odds; deployments whose share of harmful traffic is known read the thresholds, not the probability
itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from guard.bundle import Calibration
from guard.stats import CONFIDENCE, clopper_pearson
from guard.verdict import Threshold

ISOTONIC_PROMPTS = 1000
"""Fewest prompts for isotonic calibration; below, it follows the noise and Platt scaling does better."""
RESAMPLES = 1000


class CalibrationError(ValueError):
    """The scores do not support the calibration or the operating point that was asked for."""


class TooFewBenignError(CalibrationError):
    """A false-positive rate cannot be claimed on so few benign prompts."""

    def __init__(self, rate: float, have: int, need: int) -> None:
        super().__init__(
            f"a false-positive rate of {rate:g} needs at least {need} benign threshold prompts, "
            f"there are {have}"
        )


def fit_platt(logits: NDArray[Any], positive: NDArray[np.bool_]) -> Calibration:
    """Fit on logits ``[n]`` of prompts that the probe was not fitted on. Raises CalibrationError."""
    z, n1 = logits.astype(np.float64), int(positive.sum())
    n0 = len(z) - n1
    if not n0 or not n1:
        raise CalibrationError("calibration needs prompts of both classes")
    # Targets away from 0 and 1 keep the optimum finite when the classes separate.
    target = np.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    weight = np.where(positive, 0.5 / n1, 0.5 / n0)
    # A fixed scale makes the problem well conditioned whatever the units of the logits are.
    unit = float(z.std()) or 1.0

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value = parameters[0] * z / unit + parameters[1]
        total = weight @ (np.logaddexp(0.0, value) - target * value)
        slope = weight * (1 / (1 + np.exp(-np.clip(value, -500, 500))) - target)
        return float(total), np.array([slope @ z / unit, slope.sum()])

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    if slope <= 0:
        raise CalibrationError(
            "on sources it was not fitted on the probe scores positives no higher than negatives; "
            "there is nothing to calibrate"
        )
    return Calibration(slope=float(slope / unit), offset=float(offset))


def fit_isotonic(logits: NDArray[Any], positive: NDArray[np.bool_]) -> Calibration:
    """As :func:`fit_platt`, by isotonic regression. Raises CalibrationError, also for too few prompts."""
    if len(logits) < ISOTONIC_PROMPTS:
        raise CalibrationError(
            f"isotonic calibration needs at least {ISOTONIC_PROMPTS} prompts, there are {len(logits)}; "
            "use Platt scaling"
        )
    # Beyond the last knot nothing is known; Platt's slope goes on from there.
    tail = fit_platt(logits, positive).slope
    z, n1 = logits.astype(np.float64), int(positive.sum())
    n0 = len(z) - n1
    weight = np.where(positive, 0.5 / n1, 0.5 / n0)
    target = np.where(positive, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    steps = IsotonicRegression().fit(z, target, sample_weight=weight).predict(z)
    heights, step = np.unique(steps, return_inverse=True)
    centres = np.bincount(step, weight * z) / np.bincount(step, weight)
    knots = [(float(x), float(np.log(p) - np.log1p(-p))) for x, p in zip(centres, heights, strict=True)]
    # Steps that rounding alone keeps apart would make a slope without end.
    rising = knots[:1]
    for knot in knots[1:]:
        if knot[0] > rising[-1][0] and knot[1] > rising[-1][1] + 1e-9:
            rising.append(knot)
    if len(rising) < 2:
        raise CalibrationError("the probabilities do not rise with the logits; there is nothing to calibrate")
    return Calibration(kind="isotonic", slope=tail, offset=0.0, knots=tuple(rising))


def prompts_needed(rate: float) -> int:
    """Benign prompts without which a rate cannot be claimed: 0 flags in n bound the rate by 3/n (95 %)."""
    return math.ceil(3 / rate - 1e-9)


def cut(benign: NDArray[Any], rate: float) -> tuple[float, int]:
    """The score at and above which at most the share ``rate`` of ``benign`` ``[n]`` lies, and how many do.

    It lies half-way between the last flagged and the first passed prompt, so that rounding in another engine
    flips neither.
    """
    descending = np.sort(benign.astype(np.float64))[::-1]
    flagged = math.floor(rate * len(benign) + 1e-9)
    # Equal scores stand or fall together.
    while flagged and descending[flagged - 1] == descending[flagged]:
        flagged -= 1
    if not flagged:
        return float(descending[0] + 1e-6 * max(1.0, abs(descending[0]))), 0
    return float((descending[flagged - 1] + descending[flagged]) / 2), flagged


def threshold_at(logits: NDArray[Any], rate: float, calibration: Calibration) -> Threshold:
    """The operating point that flags at most the share ``rate`` of benign logits ``[n]``.

    ``upper95`` is the end of the two-sided Clopper-Pearson interval; for a threshold placed between order
    statistics it bounds the true rate exactly. Raises TooFewBenignError, or CalibrationError when the
    probabilities on both sides of the threshold round to the same number.
    """
    n = len(logits)
    if n < prompts_needed(rate):
        raise TooFewBenignError(rate, n, prompts_needed(rate))
    logit, flagged = cut(logits, rate)
    probability = calibration.probability(logit)
    if sum(calibration.probability(float(z)) >= probability for z in logits) != flagged:
        raise CalibrationError(
            f"probabilities around the threshold for a false-positive rate of {rate:g} cannot be told apart"
        )
    return Threshold(
        false_positive_rate=rate,
        probability=probability,
        logit=logit,
        benign=n,
        upper95=clopper_pearson(flagged, n).high,
    )


def rate_interval(flagged: NDArray[np.bool_], sources: NDArray[np.str_], *, seed: int = 0) -> dict[str, Any]:
    """What ``flagged`` ``[n]`` of benign prompts says about the true rate, two ways, each at 95 %.

    ``exact`` is Clopper-Pearson and holds for further prompts of the same mixture. ``over_sources`` resamples
    whole sources, and is wider where they differ; null with a single one.
    """
    n = len(flagged)
    exact = clopper_pearson(int(flagged.sum()), n)
    names, member = np.unique(sources, return_inverse=True)
    document: dict[str, Any] = {"flagged": exact.hits, "n": n, "exact": [exact.low, exact.high]}
    document["over_sources"] = None
    if len(names) > 1:
        sizes = np.bincount(member)
        hits = np.bincount(member, flagged.astype(np.float64))
        drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
        rates = hits[drawn].sum(1) / sizes[drawn].sum(1)
        tail = 100 * (1 - CONFIDENCE) / 2
        document["over_sources"] = [float(value) for value in np.percentile(rates, [tail, 100 - tail])]
    return document
