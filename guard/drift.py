"""Have the scores moved? The population stability index (PSI) of live scores against a bundle's reference.

    PSI = Σ (pᵢ − qᵢ) ln(pᵢ / qᵢ),    pᵢ = (nᵢ + ½) / (N + B/2),    qᵢ = (mᵢ + ½) / (M + B/2)

over B bins with nᵢ of N live and mᵢ of M reference scores: the symmetrised Kullback-Leibler divergence of
Jeffreys (1946), known in credit scoring as PSI (Siddiqi, Credit Risk Scorecards, 2006), which takes less than
0.1 for stable and more than 0.25 for a shift. The half in each bin keeps an empty one finite.

Without any drift PSI is not 0 but about (1/N + 1/M) times a chi-squared variable with B − 1 degrees of
freedom (Yurdakul and Naranjo, Journal of Risk Model Validation 14, 2020), whence the fewest scores for which
it says anything. The recording rules of ``deploy/prometheus`` compute the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from guard.reference import ScoreReference

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of benign scores: deciles, and the tail that thresholds lie in."""
ALERT = 0.2
"""PSI at which the alert GuardScoreDrift fires."""
ENOUGH = 500
"""Fewest live scores: with 12 bins and as many as 3,000 in the reference, 1 in 1,000 samples without drift
has a PSI above 0.073."""


class DriftError(ValueError):
    """Scores cannot be compared with a reference."""


class Drift(NamedTuple):
    """A sample of scores against a reference."""

    psi: float
    n: int
    counts: tuple[int, ...]
    """Scores by bin."""
    null95: float
    """PSI below which 95 % of samples of this size without drift stay."""
    null999: float
    """The same for 99.9 %."""

    @property
    def verdict(self) -> str:
        """``too few scores``, ``no drift``, ``moved`` (beyond chance, below the alert) or ``drift``."""
        if self.n < ENOUGH:
            return "too few scores"
        if self.psi > ALERT:
            return "drift"
        return "moved" if self.psi > self.null999 else "no drift"


def make_reference(benign: NDArray[Any], harmful: NDArray[Any]) -> ScoreReference | None:
    """The reference of P(unsafe) ``[n]`` of benign and ``[m]`` of harmful prompts.

    None when the benign scores are too much alike for two bins.
    """
    edges = np.unique(np.quantile(benign.astype(np.float64), QUANTILES))
    # An edge at the lowest score would leave the first bin empty for ever.
    edges = edges[(edges > benign.min()) & (edges < 1.0)]
    if not len(edges):
        return None

    def count(values: NDArray[Any]) -> tuple[int, ...]:
        bins = np.searchsorted(edges, values, side="right")
        return tuple(np.bincount(bins, minlength=len(edges) + 1).tolist())

    return ScoreReference(edges=tuple(edges.tolist()), benign=count(benign), harmful=count(harmful))


def psi(counts: Sequence[int], reference: Sequence[int]) -> float:
    """The index of counts in bins against those of a reference. Raises DriftError for other bins."""
    if len(counts) != len(reference):
        raise DriftError(f"{len(counts)} bins cannot be compared with {len(reference)}")
    p, q = _shares(counts), _shares(reference)
    return float(((p - q) * np.log(p / q)).sum())


def _shares(counts: Sequence[int]) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, dtype=np.float64) + 0.5
    shares: NDArray[np.float64] = smoothed / smoothed.sum()
    return shares


def null_level(bins: int, n: int, m: int, confidence: float) -> float:
    """PSI that a sample of ``n`` without drift from a reference of ``m`` exceeds with 1 − ``confidence``."""
    return float(chi2.ppf(confidence, bins - 1)) * (1 / n + 1 / m)


def compare(probabilities: Iterable[float], reference: ScoreReference) -> Drift:
    """Scores against the benign part of a reference. Raises DriftError when there is none."""
    counts = reference.count(probabilities)
    n, m = sum(counts), sum(reference.benign)
    if not n:
        raise DriftError("there is no score to compare; expected rows with a probability")
    return Drift(
        psi(counts, reference.benign),
        n,
        counts,
        null_level(reference.bins, n, m, 0.95),
        null_level(reference.bins, n, m, 0.999),
    )
