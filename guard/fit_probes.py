"""Fit on what was observed: choose layers, units and regularisation, fit, calibrate, set thresholds."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.calibrate import fit_platt
from guard.capture import Float32Array
from guard.fit_settings import FitError, FitSettings
from guard.fitting import Fitted, Fitting, Probed, Role, finished
from guard.leave_out import Choice, best_of, choose_strength
from guard.probe import BoolArray, fit_probe
from guard.scorer import Scorer, product_logit
from guard.select import SHARE, Selector, select_stable, selector
from guard.sites import ModelShape
from guard.units import Units, columns_within, count, from_columns, owners, within_layers

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
STACKED = "all, stacked"
STAGE_PROMPTS = 50
"""Fewest harmful prompts that the model refuses, and that it answers, for a probe of which it will do."""


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
