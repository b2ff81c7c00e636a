"""Fitting probes: standardise, fit by logistic regression, fold the standardisation into the weights.

Regularisation is chosen by leaving sources out, never rows: prompts of one source resemble each other, and a
random split would reward learning the source (published random-split figures flatter by several points).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import l1_min_c

from guard.scorer import Float32Array, Scorer

BoolArray = NDArray[np.bool_]
Selector = Callable[[Float32Array, BoolArray], NDArray[np.int64]]
"""From activations ``[n, features]`` and positives ``[n]`` to the columns to keep, ascending."""
STRENGTHS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
"""Inverse regularisation strengths (scikit-learn's C) that are tried; small is strong."""
SELECTION_ROWS = 5000
"""Most prompts that units are chosen on: the choice is stable long before, and takes most of a fit's time."""
LOW_FPR = 0.05
"""Strengths are compared by the area under the ROC curve up to this false-positive rate: a guard is
operated at its far left end, and the tail at 1 % alone would be too few prompts to compare on."""


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


class Choice(NamedTuple):
    """The outcome of leaving sources out."""

    strength: float
    scores: dict[float, float]
    """Mean partial AUROC of each strength over the folds."""
    held_out: Float32Array
    """Logit ``[n]`` of each prompt under the probe that was fitted without its source, at ``strength``."""
    by_source: bool
    """Whether folds were made of whole sources; False when there are too few of them."""


LINEAR = Linear()


def fit_probe(
    features: Float32Array, positive: BoolArray, *, strength: float, family: Family = LINEAR
) -> Scorer:
    """The probe at one strength. Raises ProbeError."""
    (scorer,) = family.path(features, positive, [strength])
    return scorer


def source_folds(sources: NDArray[np.str_], harmful: BoolArray, *, most: int = 6) -> NDArray[np.int64] | None:
    """Fold number of each prompt: whole sources, both labels in each fold. None when that is impossible.

    Sources are dealt out largest first, each to the fold in which its labels are scarcest so far.
    """
    names = np.unique(sources)
    # [sources, 2]: how much of each label, as a share of all there is, a source brings.
    counts = np.array([[(harmful[sources == n] == flag).sum() for flag in (True, False)] for n in names])
    shares = counts / np.maximum(1, counts.sum(axis=0))
    number = min(most, *(int(n) for n in (counts > 0).sum(axis=0)))
    for folds in range(number, 1, -1):
        load, fold_of = np.zeros((folds, 2)), {}
        for index in np.argsort(-shares.max(axis=1), kind="stable"):
            there = shares[index] > 0
            fold = int(np.argmin((load + shares[index])[:, there].max(axis=1)))
            load[fold] += shares[index]
            fold_of[names[index]] = fold
        if (load > 0).all():
            return np.array([fold_of[name] for name in sources], dtype=np.int64)
    return None


def choose_strength(
    features: Float32Array,
    positive: BoolArray,
    sources: NDArray[np.str_],
    harmful: BoolArray,
    *,
    family: Family = LINEAR,
    strengths: Sequence[float] | None = None,
    select: Selector | None = None,
    seed: int = 0,
) -> Choice:
    """Fit without each fold of sources at each strength; keep the strength that ranks held-out prompts best.

    ``features`` ``[n, features]``, the others ``[n]``; ``strengths`` are the family's unless given. With
    ``select``, columns are chosen anew in each fold: a choice that has seen the held-out prompts makes their
    scores far too good. Raises ProbeError when no fold holds both classes.
    """
    strengths = family.strengths if strengths is None else strengths
    assigned = source_folds(sources, harmful)
    by_source = assigned is not None
    folds = np.random.default_rng(seed).permutation(len(positive)) % 5 if assigned is None else assigned
    held_out = np.zeros((len(strengths), len(positive)), dtype=np.float32)
    areas: list[list[float]] = []
    for fold in np.unique(folds):
        inside = folds == fold
        rest = ~inside
        if positive[rest].all() or not positive[rest].any():
            raise ProbeError("all positives come from one source; add a harmful source to the fit data")
        seen, unseen = features[rest], features[inside]
        if select is not None:
            columns = select(seen, positive[rest])
            seen, unseen = seen[:, columns], unseen[:, columns]
        # All strengths at once: a family standardises once a fold, and that copy is the largest array here.
        for row, scorer in enumerate(family.path(seen, positive[rest], strengths)):
            held_out[row, inside] = scorer.logits(unseen)
        if positive[inside].any() and not positive[inside].all():
            areas.append(
                [float(roc_auc_score(positive[inside], row[inside], max_fpr=LOW_FPR)) for row in held_out]
            )
    if not areas:
        raise ProbeError("no fold of sources holds both classes; add sources, harmful and benign")
    mean = np.mean(areas, axis=0)
    best = int(np.argmax(mean))
    scores = {strength: float(value) for strength, value in zip(strengths, mean, strict=True)}
    return Choice(strengths[best], scores, held_out[best], by_source)


def select_columns(
    features: Float32Array, positive: BoolArray, most: int, *, seed: int = 0
) -> NDArray[np.int64]:
    """The ``most`` feature columns that an L1-regularised fit keeps first, ascending; all if there are fewer.

    The penalty is weakened step by step, each fit starting from the one before, until at least ``most``
    columns survive; of those the largest weights stay. Raises ProbeError when no column ever does.
    """
    if features.shape[1] <= most:
        return np.arange(features.shape[1], dtype=np.int64)
    rows = np.arange(len(positive))
    if len(rows) > SELECTION_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, SELECTION_ROWS, replace=False))
    standardised, target = Standard.of(features[rows]).apply(features[rows]), positive[rows]
    solver = LogisticRegression(
        l1_ratio=1.0,
        solver="saga",
        class_weight="balanced",
        max_iter=15,
        warm_start=True,
        random_state=seed,
    )
    weakest = l1_min_c(standardised, target, loss="log")
    size = np.zeros(features.shape[1])
    for factor in np.geomspace(2, 2000, 16):
        with warnings.catch_warnings():
            # Which columns survive settles long before the coefficients do.
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.set_params(C=weakest * factor).fit(standardised, target)
        size = np.abs(solver.coef_[0])
        if np.count_nonzero(size) >= most:
            break
    chosen = np.argsort(-size, kind="stable")[: min(most, np.count_nonzero(size))]
    if not len(chosen):
        raise ProbeError("the L1 fit keeps no unit; is there any signal in the data?")
    return np.sort(chosen).astype(np.int64)
