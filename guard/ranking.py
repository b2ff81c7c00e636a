"""What a ranking of prompts is worth: AUROC, average precision, and recall at a false-positive rate.

All take weights, so that thousands of resamples cost one sort. Definitions are scikit-learn's; equal scores
stand or fall together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


class Curve(NamedTuple):
    """Cumulated weights of positives and negatives at or above each distinct score, from the highest down."""

    true: Float
    """``[draws, levels]``."""
    false: Float
    """``[draws, levels]``."""

    def auroc(self) -> Float:
        """``[draws]``; a positive and a negative of one score count half."""
        rise = np.diff(self.false, axis=1, prepend=0.0)
        mean = self.true - np.diff(self.true, axis=1, prepend=0.0) / 2
        return np.asarray((rise * mean).sum(axis=1) / (self.true[:, -1] * self.false[:, -1]))

    def average_precision(self) -> Float:
        """``[draws]``: precision at each score, weighted by the recall that it adds."""
        flagged = np.maximum(self.true + self.false, np.finfo(float).tiny)
        added = np.diff(self.true, axis=1, prepend=0.0)
        return np.asarray((added * self.true / flagged).sum(axis=1) / self.true[:, -1])

    def recall(self, rate: float) -> Float:
        """``[draws]``: the largest recall at which at most the share ``rate`` of the negatives is flagged."""
        allowed = self.false <= rate * self.false[:, -1:] + 1e-9
        reached = np.where(allowed, self.true, 0.0).max(axis=1)
        return np.asarray(reached / self.true[:, -1])


class Ranking:
    """Prompts in the order of their scores."""

    def __init__(self, scores: NDArray[Any], positive: NDArray[np.bool_]) -> None:
        self._order = np.argsort(-scores.astype(np.float64), kind="stable")
        ordered = scores.astype(np.float64)[self._order]
        self._starts = np.flatnonzero(np.diff(ordered, prepend=np.inf))
        self._positive = positive[self._order].astype(np.float64)

    def curve(self, weights: Float | None = None) -> Curve:
        """The curve for weights ``[draws, n]`` in the order of the scores given; every row once if None."""
        ordered = np.ones((1, len(self._order))) if weights is None else weights[:, self._order]
        true = np.add.reduceat(ordered * self._positive, self._starts, axis=1)
        false = np.add.reduceat(ordered * (1 - self._positive), self._starts, axis=1)
        return Curve(np.cumsum(true, axis=1), np.cumsum(false, axis=1))
