"""What is attacked and with which prompts: the shipped guard, and the rows of each role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.calibrate import cut
from guard.fitting import Role
from guard.resample import Bootstrap
from guard.scorer import Float32Array, Scorer
from loadtests.redteam.outcomes import Answers
from loadtests.redteam.suffixes import Settings
from loadtests.redteam.target import Target
from models.recipe.corpus import digest
from models.recipe.detection.study import APART, VARIANTS, Study

RATE = 0.01
"""False positives on benign threshold prompts that every threshold is set for."""


class Sizes(NamedTuple):
    """How many requests each part takes, and the seed of all draws."""

    seed: int = 0
    asked: int = 200
    """Flagged test requests under the attacks that only ask."""
    searched: int = 64
    """Those, from the same beginning, for which a suffix is searched."""
    lengths: tuple[int, ...] = (1, 3, 12)
    """Tokens of the suffixes."""
    fitted: int = 1200
    """Rows of each label that are attacked for refitting."""
    ways: int = 4
    """Attacks that each of them is put through."""
    suffixes: int = 150
    """Fit requests for which a suffix is searched, of each length in turn; each is put behind several rows of
    both labels."""
    benign: int = 150
    """Benign test rows that are attacked, to see what refitting costs them."""
    search: Settings = Settings()
    fit_search: Settings = Settings(queries=64)


class Guard(NamedTuple):
    """A probe with its threshold."""

    probe: Scorer
    cut: float
    """The logit at and above which a prompt is flagged."""

    def flags(self, features: Float32Array) -> NDArray[np.bool_]:
        """Which rows are flagged, ``[n]``."""
        return np.asarray(self.probe.logits(features) >= self.cut)


@dataclass(frozen=True)
class World:
    """Everything a measurement needs. Test rows share no request with the others."""

    target: Target
    fit: Role
    calm: Role
    """Benign rows that set thresholds."""
    test: Role
    strength: float
    """Inverse regularisation of the shipped probe, with which it is refitted."""
    answers: Answers | None = None
    bootstrap: Bootstrap = Bootstrap()  # noqa: RUF009  (frozen)

    @classmethod
    def of(cls, study: Study) -> World:
        """The lab guard. Raises TargetError when the model is another."""
        variant = VARIANTS[0]
        subject, bundle = study.subject(variant), study.bundle(variant)
        sites = bundle.card.sites
        target = Target.of(subject, sites, bundle.scorer)
        subject.progress = False  # many short passes: one bar a part is enough

        def answers(texts: Sequence[str]) -> list[str]:
            return subject.answers([target.encode(text) for text in texts], "attacked")

        return cls(
            target,
            study.role(variant, study.fitted_on(variant, study.fit), sites),
            study.role(variant, study.threshold, sites),
            study.role(variant, study.evaluate, sites),
            float(bundle.card.metrics["fit"]["inverse_regularisation"]),
            answers,
            study.bootstrap,
        )

    def guard(self, probe: Scorer) -> Guard:
        """A probe with the threshold that keeps its promise on the calm rows."""
        return Guard(probe, cut(probe.logits(self.calm.features), RATE)[0])

    def flagged(self, guard: Guard, most: int, seed: int) -> list[str]:
        """Harmful test requests that ``guard`` flags, in an order that depends on seed and text alone."""
        rows = np.flatnonzero(self.test.seen.harmful & guard.flags(self.test.features))
        return shuffled([self.test.seen.prompts[row].text for row in rows], seed)[:most]

    @property
    def pooled(self) -> NDArray[np.bool_]:
        """Test rows of which figures are taken: all but benign sources that are reported apart."""
        return self.test.seen.harmful | ~np.isin(self.test.seen.sources, APART)


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The texts by a hash, so that one more or less moves no other."""
    return sorted(texts, key=lambda text: digest(f"{seed}:{text}"))


def open_study(data: Path, lab: Path, store: Path) -> Study:
    """The study whose prompts and bundle are attacked."""
    return Study(data, lab, store)
