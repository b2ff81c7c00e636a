"""Fitting probes: standardise, fit by logistic regression, fold the standardisation into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from guard.scorer import Float32Array, Scorer

BoolArray = NDArray[np.bool_]
STRENGTHS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
"""Inverse regularisation strengths (scikit-learn's C) that are tried; small is strong."""


class ProbeError(ValueError):
    """The data cannot support a fit."""


class Standard(NamedTuple):
    """Mean and scale of each feature, float64 ``[features]``."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, features: Float32Array) -> Standard:
        """Measured in float64. A feature that never varies gets an infinite scale and so no weight."""
        mean = features.mean(axis=0, dtype=np.float64)
        scale = features.std(axis=0, dtype=np.float64)
        constant = scale <= 1e-7 * np.maximum(1e-30, np.abs(mean))
        return cls(mean, np.where(constant, np.inf, scale))

    def apply(self, features: Float32Array) -> Float32Array:
        """Standardised features, float32."""
        return ((features - self.mean.astype(np.float32)) / self.scale.astype(np.float32)).astype(np.float32)

    def fold(
        self, weight: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[Float32Array, Float32Array]:
        """The same rows on raw features: w' = w / σ, b' = b − Σ w μ / σ.

        ``weight`` ``[rows, features]``, ``bias`` ``[rows]``; what comes back has the same shapes.
        """
        folded = weight / self.scale
        return folded.astype(np.float32), (bias - folded @ self.mean).astype(np.float32)


class Family(Protocol):
    """A kind of probe, and how one is fitted."""

    @property
    def strengths(self) -> Sequence[float]:
        """Inverse regularisation strengths worth trying."""

    def path(self, features: Float32Array, positive: BoolArray, strengths: Sequence[float]) -> list[Scorer]:
        """One probe for each strength, on raw ``features`` ``[n, features]``. Raises ProbeError."""


@dataclass(frozen=True)
class Linear:
    """L2 logistic regression on standardised features, classes weighted equally."""

    strengths: Sequence[float] = STRENGTHS

    def path(self, features: Float32Array, positive: BoolArray, strengths: Sequence[float]) -> list[Scorer]:
        """Each fit starts from the solution of the one before."""
        need_both(positive)
        standard = Standard.of(features)
        standardised = standard.apply(features)
        solver = LogisticRegression(class_weight="balanced", max_iter=5000, warm_start=True, random_state=0)
        scorers = []
        for strength in strengths:
            solver.set_params(C=strength).fit(standardised, positive)
            folded = standard.fold(solver.coef_.astype(np.float64), solver.intercept_.astype(np.float64))
            scorers.append(Scorer(*folded))
        return scorers


def need_both(positive: BoolArray) -> None:
    """Raises ProbeError unless there are positives and negatives."""
    if positive.all() or not positive.any():
        raise ProbeError(
            f"a probe needs both classes, but {int(positive.sum())} of {len(positive)} prompts are positive"
        )


LINEAR = Linear()


def fit_probe(
    features: Float32Array, positive: BoolArray, *, strength: float, family: Family = LINEAR
) -> Scorer:
    """The probe at one strength. Raises ProbeError."""
    (scorer,) = family.path(features, positive, [strength])
    return scorer
