"""Fit on what was observed: choose layers, units and regularisation, fit, calibrate, set thresholds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from guard.bundle import Calibration
from guard.calibrate import (
    TooFewBenignError,
    cut,
    fit_isotonic,
    fit_platt,
    rate_interval,
    threshold_at,
)
from guard.capture import Float32Array
from guard.drift import make_reference
from guard.fit_settings import FitError, FitSettings
from guard.leave_out import Choice, best_of, choose_strength
from guard.observe import Observations
from guard.probe import BoolArray, fit_probe
from guard.reference import ScoreReference
from guard.scorer import Scorer, product_logit
from guard.select import SHARE, Selector, select_stable, selector
from guard.sequence import SequenceScorer
from guard.sites import ModelShape
from guard.stats import wilson
from guard.units import Units, columns_within, count, from_columns, owners, within_layers
from guard.verdict import Threshold

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
AnyProbe = TypeVar("AnyProbe", Scorer, SequenceScorer)
STACKED = "all, stacked"
STAGE_PROMPTS = 50
"""Fewest harmful prompts that the model refuses, and that it answers, for a probe of which it will do."""


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


def fit_probes(fitting: Fitting, benign: Role, settings: FitSettings) -> Fitted[Scorer]:
    """The whole of it. Raises FitError, ProbeError or CalibrationError."""
    options = _options(fitting, settings)
    harmful = fitting.role.seen.harmful
    target = harmful if settings.probe == "product" else fitting.positive
    choices = {name: _choose(fitting, units, target, settings) for name, units in options.items()}
    name = best_of(choices)
    choice, units = choices[name], options[name]
    about: dict[str, Any] = {"sources_left_out": left_out(choice)}
    if len(options) > 1:
        about["layers"] = {"chosen": name, **{key: left_out(each) for key, each in choices.items()}}
        logger.info("layers: %s", name)
    if (select := _selector(units, fitting.shape, settings)) is not None:
        units, about["selection"] = _select(fitting, units, target, select, settings)
    columns = columns_within(units, fitting.read, fitting.shape)
    logger.info("%d units at %d sites", count(units), len(units))

    features = fitting.role.features[:, columns]
    if settings.probe == "product":
        probe, held_out, about["stages"] = _product(fitting, features, choice, settings)
    else:
        probe = fit_probe(features, target, strength=choice.strength, family=settings.family)
        held_out = choice.held_out
    calm = probe.logits(benign.features[:, columns])
    return finished(
        fitting, Probed(units, columns, probe, choice, held_out, about), calm, benign.seen, settings
    )


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


def _options(fitting: Fitting, settings: FitSettings) -> dict[str, Units]:
    """The sets of layers that compete, by name. Raises FitError for layers that are not there."""
    layers = sorted({site.layer for site in fitting.read})
    if isinstance(settings.layers, tuple):
        if unknown := sorted(set(settings.layers) - set(layers)):
            raise FitError(
                f"no units are read in layer {', '.join(map(str, unknown))}; "
                f"there are layers {', '.join(map(str, layers))}"
            )
        named = ", ".join(map(str, sorted(set(settings.layers))))
        return {f"layers {named}": within_layers(fitting.read, settings.layers)}
    if settings.layers == "choose" and len(layers) > 1:
        alone = {f"layer {layer}": within_layers(fitting.read, [layer]) for layer in layers}
        return {STACKED: fitting.read, **alone}
    return {STACKED: fitting.read}


def units_of_layers(fitting: Fitting, settings: FitSettings) -> tuple[str, Units]:
    """The units of the layers that were named, and what they are called. Raises FitError."""
    ((name, units),) = _options(fitting, settings).items()
    return name, units


def _selector(units: Units, shape: ModelShape, settings: FitSettings) -> Selector | None:
    if settings.units not in ("l1", "stability"):
        return None
    return selector(settings.units, settings.max_units, owners(units, shape), settings.seed)


def _choose(fitting: Fitting, units: Units, target: BoolArray, settings: FitSettings) -> Choice:
    seen = fitting.role.seen
    return choose_strength(
        fitting.role.features[:, columns_within(units, fitting.read, fitting.shape)],
        target,
        seen.sources,
        seen.harmful,
        family=settings.family,
        select=_selector(units, fitting.shape, settings),
        groups=fitting.groups,
        seed=settings.seed,
    )


def _select(
    fitting: Fitting, units: Units, target: BoolArray, select: Selector, settings: FitSettings
) -> tuple[Units, dict[str, Any]]:
    """The units that are kept on all prompts, and how clearly."""
    features = fitting.role.features[:, columns_within(units, fitting.read, fitting.shape)]
    about: dict[str, Any] = {"method": settings.units, "candidates": count(units)}
    if settings.units == "stability":
        owner = owners(units, fitting.shape)
        stable = select_stable(features, target, settings.max_units, owner=owner, seed=settings.seed)
        kept = np.unique(owner[stable.columns])
        about |= {"least_share": SHARE, "kept_by_each_fit": stable.a_fit}
        about["share_of_halves"] = [float(stable.frequency[unit]) for unit in kept]
        return from_columns(stable.columns, units, fitting.shape), about
    return from_columns(select(features, target), units, fitting.shape), about


def _product(
    fitting: Fitting, features: Float32Array, harm: Choice, settings: FitSettings
) -> tuple[Scorer, Float32Array, dict[str, Any]]:
    """Two probes whose probabilities are multiplied; held-out logits ``[n]`` of the product; how each did.

    The second one is fitted on harmful prompts alone. Each is calibrated on sources that it was fitted
    without, and the calibration is folded into its row, so that what is multiplied are probabilities.
    """
    seen = fitting.role.seen
    asked = seen.harmful
    answered, refused = int((asked & ~seen.refused).sum()), int((asked & seen.refused).sum())
    if min(answered, refused) < STAGE_PROMPTS:
        raise FitError(
            f"a probe of whether the model complies needs {STAGE_PROMPTS} harmful prompts of each kind, but "
            f"the model answers {answered} and refuses {refused}; fit a single probe (--probe linear)"
        )
    complied = ~seen.refused[asked]
    comply = choose_strength(
        features[asked],
        complied,
        seen.sources[asked],
        complied,
        groups=fitting.groups[asked],
        seed=settings.seed,
    )
    stages = (
        (fit_probe(features, asked, strength=harm.strength), fit_platt(harm.held_out, asked)),
        (
            fit_probe(features[asked], complied, strength=comply.strength),
            fit_platt(comply.held_out, complied),
        ),
    )
    slopes = np.array([calibration.slope for _, calibration in stages])
    offsets = np.array([calibration.offset for _, calibration in stages])
    weight = np.concatenate([probe.weight for probe, _ in stages]) * slopes[:, None]
    bias = np.concatenate([probe.bias for probe, _ in stages]) * slopes + offsets
    product = Scorer(weight.astype(np.float32), bias.astype(np.float32), product=True)
    # Benign prompts take no part in the second fit: its logits of them are held out as they are.
    second = stages[1][0].logits(features)
    second[asked] = comply.held_out
    held_out = product_logit(slopes[0] * harm.held_out + offsets[0], slopes[1] * second + offsets[1])
    about = {
        "harmful_prompt": left_out(harm),
        "complies": {"answered": answered, "refused": refused, **left_out(comply)},
    }
    return product, held_out, about


def left_out(choice: Choice) -> dict[str, Any]:
    """Figures of sources that were left out, mean and worst first."""
    return {
        "folds": choice.folds,
        "inverse_regularisation": choice.strength,
        "mean_partial_auroc": choice.mean,
        "worst_partial_auroc": choice.sources[choice.worst].partial_auroc,
        "worst_source": choice.worst,
        "mean_auroc": float(np.mean([left.auroc for left in choice.sources.values()])),
        "by_source": {name: left._asdict() for name, left in choice.sources.items()},
    }


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
