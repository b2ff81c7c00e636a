"""From raw logits to P(unsafe), and from a wanted false-positive rate to a threshold.

Platt scaling after Platt (1999) with the smoothed targets and the Newton iteration of Lin, Lin and Weng
(2007). Both classes weigh the same, so P(unsafe) is the probability at even odds; deployments whose share of
harmful traffic is known read the thresholds, not the probability itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from guard.bundle import Calibration
from guard.stats import clopper_pearson
from guard.verdict import Threshold


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
