"""Do probabilities mean what they say? Expected calibration error against its own null distribution.

A calibration error is never zero: at n prompts even a perfect model shows some. It is therefore held against
what labels drawn from the probabilities themselves would give.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.stats import wilson

BINS = 10
SIMULATIONS = 1000

Float = NDArray[np.float64]


def at_prior(logits: Float, positive: NDArray[np.bool_]) -> Float:
    """Probabilities ``[n]`` from log-odds at even odds, moved to the base rate of these prompts.

    Bundles are calibrated at even odds (``guard.calibrate``); P = 1 / (1 + exp(-(z + log(n1 / n0)))) is what
    the same evidence means where positives are more or less frequent.
    """
    positives = int(positive.sum())
    shifted = logits + np.log(positives) - np.log(len(positive) - positives)
    return np.asarray(1 / (1 + np.exp(-np.clip(shifted, -500, 500))))


def calibration(
    probabilities: Float, positive: NDArray[np.bool_], *, seed: int = 0, simulations: int = SIMULATIONS
) -> dict[str, Any] | None:
    """Bins of equal numbers of prompts, calibration error, Brier score; None when a class is missing.

    ``null`` has the mean and the 95th percentile of the error of labels drawn from ``probabilities`` at this
    n, and ``p_value`` the share of such errors that are as large as the one found.
    """
    if positive.all() or not positive.any():
        return None
    order = np.argsort(probabilities, kind="stable")
    sizes = np.array([len(part) for part in np.array_split(order, min(BINS, len(order)))])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    said = probabilities[order]
    hits = np.add.reduceat(positive[order].astype(np.float64), starts)
    expected = np.add.reduceat(said, starts)
    random = np.random.default_rng(seed)
    error = float(np.abs(hits - expected).sum() / len(said))
    null = np.empty(simulations)
    for index in range(simulations):
        drawn = np.add.reduceat((random.random(len(said)) < said).astype(np.float64), starts)
        null[index] = np.abs(drawn - expected).sum() / len(said)
    bins = []
    for start, size, hit, total in zip(starts, sizes, hits, expected, strict=True):
        rate = wilson(int(hit), int(size))
        bins.append(
            {
                "n": int(size),
                "low": float(said[start]),
                "high": float(said[start + size - 1]),
                "predicted": float(total / size),
                "observed": rate.value,
                "observed_interval": (rate.low, rate.high),
            }
        )
    return {
        "n": len(said),
        "base_rate": float(positive.mean()),
        "expected_calibration_error": error,
        "null": {"mean": float(null.mean()), "p95": float(np.percentile(null, 95))},
        "p_value": float((1 + (null >= error).sum()) / (1 + simulations)),
        "brier": float(np.mean((probabilities - positive) ** 2)),
        "bins": bins,
    }
