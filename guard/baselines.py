"""What a probe is held against: words alone, and random units of the same layers.

Each baseline is a set of scores for the fit-independent prompts, so that thresholds and tables treat it
exactly like the probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from guard.capture import Float32Array
from guard.data import Prompt
from guard.probe import LINEAR, BoolArray, Family, fit_probe

WORD_STRENGTH = 10.0
"""C of the word baseline; on prompts of this kind values from 1 to 10 differ little."""
RANDOM_DRAWS = 3


class Scores(NamedTuple):
    """Logits of one scorer on the threshold and on the evaluation prompts."""

    threshold: NDArray[Any]
    evaluate: NDArray[Any]


def words(
    fit: Sequence[Prompt], positive: BoolArray, threshold: Sequence[Prompt], evaluate: Sequence[Prompt]
) -> Scores:
    """Logistic regression on TF-IDF weighted word 1- and 2-grams of the last user turn."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, lowercase=True)
    matrix = vectorizer.fit_transform([prompt.text for prompt in fit])
    solver = LogisticRegression(C=WORD_STRENGTH, class_weight="balanced", max_iter=5000)
    solver.fit(matrix, positive)

    def score(prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        scores = solver.decision_function(vectorizer.transform([prompt.text for prompt in prompts]))
        return np.asarray(scores, dtype=np.float64)

    return Scores(score(threshold), score(evaluate))


def columns(
    features: tuple[Float32Array, Float32Array, Float32Array],
    chosen: NDArray[np.int64],
    positive: BoolArray,
    *,
    strength: float,
    family: Family = LINEAR,
) -> Scores:
    """A probe on other columns of (fit, threshold, evaluate) activations, fitted like the one it is for."""
    fit, threshold, evaluate = (part[:, chosen] for part in features)
    probe = fit_probe(fit, positive, strength=strength, family=family)
    return Scores(probe.logits(threshold), probe.logits(evaluate))
