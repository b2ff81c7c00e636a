"""The scores that a guard gave when it was fitted, as counts in bins: what live scores are compared with.

The gateway counts with these bins, so this module needs neither torch nor numpy; ``guard.drift`` makes them
and compares.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_EDGES = 31
"""Bounds the series that a gateway exports for one bundle."""

Count = Annotated[int, Field(ge=0)]


class ScoreReference(BaseModel):
    """P(unsafe) in bins that were set at quantiles of the benign threshold prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    edges: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(min_length=1, max_length=MOST_EDGES)
    """P(unsafe), ascending; a score that equals an edge lies above it."""
    benign: tuple[Count, ...]
    """Benign prompts that the thresholds were set on, by bin."""
    harmful: tuple[Count, ...]
    """Harmful prompts of the fit, by bin, each scored by a probe that was fitted without its source."""

    @model_validator(mode="after")
    def _consistent(self) -> ScoreReference:
        if any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("the edges of a score reference must rise")
        for name, counts in (("benign", self.benign), ("harmful", self.harmful)):
            if len(counts) != self.bins:
                raise ValueError(f"{len(self.edges)} edges make {self.bins} bins, {name} has {len(counts)}")
        if not sum(self.benign):
            raise ValueError("a score reference rests on one benign prompt at least")
        return self

    @property
    def bins(self) -> int:
        """Number of bins; the first begins at 0, the last ends at 1."""
        return len(self.edges) + 1

    def bin_of(self, probability: float) -> int:
        """The bin that a score falls into, counted from 0."""
        return bisect_right(self.edges, probability)

    def count(self, probabilities: Iterable[float]) -> tuple[int, ...]:
        """How many scores fall into each bin."""
        counts = [0] * self.bins
        for probability in probabilities:
            counts[self.bin_of(probability)] += 1
        return tuple(counts)
