"""Choosing by leaving sources out: how strong a probe's penalty is, and which layers it reads.

Whole sources are left out, never rows: prompts of one source resemble each other, and a random split would
reward learning the source (published random-split figures flatter by several points). A prompt that also
occurs, nearly word for word, in a source that is left out is not fitted on in that turn either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from guard.probe import LINEAR, BoolArray, Family, ProbeError
from guard.scorer import Float32Array
from guard.select import Selector

IntArray = NDArray[np.int64]
LOW_FPR = 0.05
"""Probes are compared by the area under the ROC curve up to this false-positive rate: a guard is operated at
its far left end, and the tail at 1 % alone would be too few prompts to compare on."""
MOST_FOLDS = 12
"""Most times that sources are left out; with no more harmful sources than this, each goes alone."""
ROW_FOLDS = 5


class Left(NamedTuple):
    """How one source is ranked by probes that were fitted without it."""

    positives: int
    partial_auroc: float
    """Area up to ``LOW_FPR``, scaled so that chance is 0.5, against the negatives that were left out too."""
    auroc: float


class Choice(NamedTuple):
    """The outcome of leaving sources out."""

    strength: float
    scores: dict[float, float]
    """Mean partial AUROC of each strength over the sources of positives."""
    held_out: Float32Array
    """Logit ``[n]`` of each prompt under the probe that was fitted without its source, at ``strength``."""
    by_source: bool
    """Whether folds were made of whole sources; False when there are too few of them."""
    sources: dict[str, Left]
    """Each source of positives, at ``strength``."""
    folds: int

    @property
    def mean(self) -> float:
        """Mean partial AUROC over the sources of positives."""
        return self.scores[self.strength]

    @property
    def worst(self) -> str:
        """The source of positives that is ranked worst."""
        return min(self.sources, key=lambda name: self.sources[name].partial_auroc)


def source_folds(sources: NDArray[np.str_], harmful: BoolArray, *, most: int = MOST_FOLDS) -> IntArray | None:
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


def splits(folds: IntArray, groups: IntArray | None = None) -> Iterator[tuple[BoolArray, BoolArray]]:
    """For each fold the prompts left out and those to fit on, both ``[n]``; no group is on both sides."""
    for fold in np.unique(folds):
        inside = folds == fold
        yield inside, ~inside if groups is None else ~inside & ~np.isin(groups, groups[inside])


def choose_strength(
    features: Float32Array,
    positive: BoolArray,
    sources: NDArray[np.str_],
    harmful: BoolArray,
    *,
    family: Family = LINEAR,
    strengths: Sequence[float] | None = None,
    select: Selector | None = None,
    groups: IntArray | None = None,
    seed: int = 0,
) -> Choice:
    """Fit without each fold of sources at each strength; keep the strength that ranks held-out prompts best.

    ``features`` ``[n, features]``, the others ``[n]``; ``strengths`` are the family's unless given; prompts
    with equal ``groups`` are never on both sides. With ``select``, columns are chosen anew in each fold: a
    choice that has seen the held-out prompts makes their scores far too good. Raises ProbeError when no fold
    holds both classes.
    """
    strengths = family.strengths if strengths is None else strengths
    folds, by_source = folds_of(sources, harmful, groups, seed)
    held_out = np.zeros((len(strengths), len(positive)), dtype=np.float32)
    for inside, rest in splits(folds, groups):
        need_elsewhere(positive, rest)
        seen, unseen = features[rest], features[inside]
        if select is not None:
            columns = select(seen, positive[rest])
            seen, unseen = seen[:, columns], unseen[:, columns]
        # All strengths at once: a family standardises once a fold, and that copy is the largest array here.
        for row, scorer in enumerate(family.path(seen, positive[rest], strengths)):
            held_out[row, inside] = scorer.logits(unseen)
    return best_strength(strengths, held_out, positive, sources, folds, by_source=by_source)


def folds_of(
    sources: NDArray[np.str_],
    harmful: BoolArray,
    groups: IntArray | None = None,
    seed: int = 0,
    *,
    most: int = MOST_FOLDS,
) -> tuple[IntArray, bool]:
    """Fold number ``[n]`` of each prompt, and whether folds are whole sources: rows, where they cannot be."""
    assigned = source_folds(sources, harmful, most=most)
    if assigned is None:
        return _row_folds(len(sources), groups, seed), False
    return assigned, True


def need_elsewhere(positive: BoolArray, rest: BoolArray) -> None:
    """Raises ProbeError when the prompts outside of a fold are of one class."""
    if not rest.any() or positive[rest].all() or not positive[rest].any():
        raise ProbeError("all positives come from one source; add a harmful source to the fit data")


def best_strength(
    strengths: Sequence[float],
    held_out: Float32Array,
    positive: BoolArray,
    sources: NDArray[np.str_],
    folds: IntArray,
    *,
    by_source: bool,
) -> Choice:
    """The strength whose logits ``held_out`` ``[strengths, n]`` rank best. Raises ProbeError."""
    areas: dict[str, list[list[float]]] = {}
    whole: dict[str, list[list[float]]] = {}
    for fold in np.unique(folds):
        inside = folds == fold
        for name in np.unique(sources[inside & positive]).tolist():
            compared = inside & (~positive | (sources == name))
            if positive[compared].all():
                continue
            for table, limit in ((areas, LOW_FPR), (whole, None)):
                table.setdefault(name, []).append(
                    [
                        float(roc_auc_score(positive[compared], row[compared], max_fpr=limit))
                        for row in held_out
                    ]
                )
    if not areas:
        raise ProbeError("no fold of sources holds both classes; add sources, harmful and benign")
    # A source that is spread over folds of rows counts once, like any other.
    figures = {name: np.mean(found, axis=0) for name, found in areas.items()}
    mean = np.mean(list(figures.values()), axis=0)
    best = int(np.argmax(mean))
    left = {
        name: Left(
            int((positive & (sources == name)).sum()),
            float(found[best]),
            float(np.mean(whole[name], axis=0)[best]),
        )
        for name, found in figures.items()
    }
    scores = {strength: float(value) for strength, value in zip(strengths, mean, strict=True)}
    return Choice(strengths[best], scores, held_out[best], by_source, left, len(np.unique(folds)))


def _row_folds(rows: int, groups: IntArray | None, seed: int) -> IntArray:
    """Folds of rows, for data with too few sources; a group stays together."""
    known, member = np.unique(np.arange(rows) if groups is None else groups, return_inverse=True)
    shuffled: IntArray = np.random.default_rng(seed).permutation(len(known))[member] % ROW_FOLDS
    return shuffled


def best_of(choices: Mapping[str, Choice]) -> str:
    """The option with the best mean over sources; among equals the first."""
    return max(choices, key=lambda name: choices[name].mean)
