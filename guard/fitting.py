"""What a fit is given and what it makes; calibration, thresholds and reference of any fitted probe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Calibration
from guard.calibrate import TooFewBenignError, cut, fit_isotonic, fit_platt, rate_interval, threshold_at
from guard.capture import Float32Array
from guard.drift import make_reference
from guard.fit_settings import FitSettings
from guard.leave_out import Choice
from guard.observe import Observations
from guard.probe import BoolArray
from guard.reference import ScoreReference
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.sites import ModelShape
from guard.stats import wilson
from guard.units import Units
from guard.verdict import Threshold

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
AnyProbe = TypeVar("AnyProbe", Scorer, SequenceScorer)


class Role(NamedTuple):
    """One role's observations and their activations ``[n, features]`` for all units that were read."""

    seen: Observations
    features: Float32Array


@dataclass(frozen=True)
class Fitting:
    """What is fitted on, and how its columns are named."""

    role: Role
    positive: BoolArray
    """What counts as positive, ``[n]``."""
    groups: IntArray
    """Prompts with equal numbers are one request, ``[n]``."""
    hard: BoolArray
    """Hard negatives, ``[n]``."""
    read: Units
    """The units of ``role.features``, in this order."""
    shape: ModelShape


class Probed(NamedTuple, Generic[AnyProbe]):
    """A probe, and how it was chosen."""

    units: Units
    columns: IntArray
    """Where its features stand among those that were read."""
    probe: AnyProbe
    choice: Choice
    held_out: Float32Array
    """Logit ``[n]`` of each prompt to fit on, by a probe that did not see its source."""
    about: dict[str, Any]


@dataclass(frozen=True)
class Fitted(Generic[AnyProbe]):
    """A fitted probe before it is measured and packed."""

    units: Units
    columns: IntArray
    """Where its features stand among those that were read."""
    probe: AnyProbe
    choice: Choice
    thresholds: tuple[Threshold, ...]
    calibration: Calibration
    omitted: tuple[str, ...]
    """Why a threshold that was asked for is not there."""
    about: dict[str, Any]
    """How units, layers and regularisation were chosen, for the card."""
    reference: ScoreReference | None
    """The scores of benign threshold prompts and, held out, of the fit's harmful ones."""


def finished(
    fitting: Fitting,
    probed: Probed[AnyProbe],
    calm: Float32Array,
    benign: Observations,
    settings: FitSettings,
) -> Fitted[AnyProbe]:
    """Calibrated, with thresholds and reference; ``calm`` ``[m]`` are the logits of ``benign``.

    Raises CalibrationError.
    """
    about, held_out = dict(probed.about), probed.held_out
    calibrate = fit_isotonic if settings.calibration == "isotonic" else fit_platt
    calibration = calibrate(held_out, fitting.positive)
    if fitting.hard.any():
        about["hard_negatives"] = _hard_negatives(fitting, held_out)
    thresholds, omitted, about["thresholds"] = _thresholds(calm, benign, calibration, settings)
    harmful = fitting.role.seen.harmful
    reference = make_reference(
        *(_stated(logits, calibration) for logits in (calm[~benign.harmful], held_out[harmful]))
    )
    units, columns, probe, choice = probed[:4]
    return Fitted(units, columns, probe, choice, thresholds, calibration, omitted, about, reference)


def _stated(logits: Float32Array, calibration: Calibration) -> NDArray[np.float64]:
    """P(unsafe) as an engine states it."""
    return np.array([calibration.probability(float(logit)) for logit in logits], dtype=np.float64)


def _hard_negatives(fitting: Fitting, held_out: Float32Array) -> dict[str, Any]:
    """How many of each source of hard negatives, when left out, lie above the 1 % cut of other negatives."""
    plain = ~fitting.positive & ~fitting.hard
    sources = fitting.role.seen.sources
    score, _ = cut(held_out[plain], 0.01)
    rates = {}
    for name in np.unique(sources[fitting.hard]).tolist():
        here = fitting.hard & (sources == name)
        rates[name] = wilson(int((held_out[here] >= score).sum()), int(here.sum())).document()
    return {"flagged_when_left_out": rates}


def _thresholds(
    logits: Float32Array, seen: Observations, calibration: Calibration, settings: FitSettings
) -> tuple[tuple[Threshold, ...], tuple[str, ...], dict[str, Any]]:
    """Operating points on benign prompts that nothing was fitted on; raises without the default one."""
    quiet = ~seen.harmful
    logits, sources = logits[quiet], seen.sources[quiet]
    thresholds, omitted = [], []
    intervals: dict[str, Mapping[str, Any]] = {}
    for rate in sorted(settings.rates, reverse=True):
        try:
            threshold = threshold_at(logits, rate, calibration)
        except TooFewBenignError as error:
            if rate == settings.default_rate:
                raise
            logger.warning("%s; this threshold is left out", error)
            omitted.append(str(error))
            continue
        thresholds.append(threshold)
        intervals[f"{rate:g}"] = rate_interval(logits >= threshold.logit, sources, seed=settings.seed)
    return tuple(thresholds), tuple(omitted), dict(intervals)
