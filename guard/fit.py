"""Make a Bundle: observe the model, choose units, fit, calibrate, set thresholds, measure, record."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import sklearn
import torch
import transformers
from numpy.typing import NDArray

import guard
from guard import baselines, evaluate, self_test
from guard.bundle import Bundle, Calibration, DataFile, GuardCard
from guard.calibrate import TooFewBenignError, fit_platt, threshold_at
from guard.capture import Float32Array
from guard.data import Dataset
from guard.fit_settings import FitError, FitSettings
from guard.observe import Observations, Subject
from guard.probe import (
    BoolArray,
    Choice,
    Selector,
    choose_strength,
    fit_probe,
    select_columns,
)
from guard.scorer import Scorer
from guard.units import (
    Units,
    columns_within,
    count,
    every_neuron,
    from_columns,
    located_with,
    random_like,
    read_units,
    union,
)
from guard.verdict import Threshold

logger = logging.getLogger(__name__)

Judged = Literal["all", "harmful", "none"]
MEMORY_LIMIT = 12 * 2**30
"""Most bytes of activations that one role may take; beyond it units have to be named."""


@dataclass(frozen=True)
class Fitted:
    """A fitted probe before it is measured and packed."""

    units: Units
    probe: Scorer
    choice: Choice
    thresholds: tuple[Threshold, ...]
    calibration: Calibration
    omitted: tuple[str, ...]
    """Why a threshold that was asked for is not there."""


class Role(NamedTuple):
    """One role's observations and their activations ``[n, features]`` for all units that were read."""

    seen: Observations
    features: Float32Array


def fit_bundle(
    subject: Subject,
    settings: FitSettings,
    fit: Dataset,
    threshold: Dataset,
    evaluation: Dataset | None = None,
) -> Bundle:
    """The whole of ``neuronguard fit``. Raises FitError, ProbeError, CalibrationError or UnitsError."""
    shape = subject.checkpoint.shape
    named: Units | None = None
    located: tuple[DataFile, ...] = ()
    if settings.units_file:
        weights = subject.checkpoint.weights_sha256
        named = read_units(settings.units_file, shape, weights_sha256=weights)
        located = _located_with(settings.units_file, threshold, evaluation)
    # Random controls are read in the same pass as the units they are for.
    draws = _draws(named, subject, settings.seed) if named else []
    read = union([named, *draws]) if named else every_neuron(shape)
    _check_memory(read, subject, max(len(d.prompts) for d in (fit, threshold, evaluation) if d))

    fitting = _observe(subject, fit, read, judge="harmful" if settings.label == "unsafe_output" else "none")
    benign = _observe(subject, threshold, read, judge="none")
    positive = fitting.seen.target(settings.label)
    logger.info("%d prompts to fit on, %d of them positive", len(positive), positive.sum())

    select: Selector | None = None
    units = named or read
    if settings.units == "l1":
        select = partial(select_columns, most=settings.max_units, seed=settings.seed)
        units = from_columns(select(fitting.features, positive), read, shape)
    columns = columns_within(units, read, shape)
    logger.info("%d units at %d sites", count(units), len(units))
    fitted = fit_units(units, fitting, benign, columns, positive, settings, select)

    metrics: dict[str, Any] = {"fit": _about(fitted, positive, (fit, fitting), (threshold, benign))}
    if evaluation is not None:
        held_out = _observe(subject, evaluation, read, judge="all")
        logits = fitted.probe.logits(held_out.features[:, columns])
        metrics["evaluation"] = evaluate.tables(
            held_out.seen, logits, fitted.thresholds, apart=settings.apart
        )
        selections = {"probe": columns}
        if len(columns) < fitting.features.shape[1]:
            for number, draw in enumerate(draws or _draws(units, subject, settings.seed), start=1):
                selections[f"random units, draw {number}"] = columns_within(draw, read, shape)
        metrics["comparison"] = _compare((fitting, benign, held_out), positive, fitted, settings, selections)
    files = fit.files + threshold.files + (evaluation.files if evaluation else ())
    # What chose the units counts as fitted on: it can evaluate no more than the rest.
    files += tuple(file for file in located if file.sha256 not in {known.sha256 for known in files})
    return _pack(subject, settings, fitted, files, metrics)


def fit_units(
    units: Units,
    fitting: Role,
    benign: Role,
    chosen: NDArray[np.int64],
    positive: BoolArray,
    settings: FitSettings,
    select: Selector | None = None,
) -> Fitted:
    """Choose the regularisation, fit, calibrate and set thresholds on the columns ``chosen``.

    ``select`` is how they were chosen, if it was on these prompts.
    """
    seen, features = fitting.seen, fitting.features[:, chosen]
    choice = choose_strength(
        features if select is None else fitting.features,
        positive,
        seen.sources,
        seen.harmful,
        family=settings.family,
        select=select,
        seed=settings.seed,
    )
    probe = fit_probe(features, positive, strength=choice.strength, family=settings.family)
    calibration = fit_platt(choice.held_out, positive)
    logits = probe.logits(benign.features[:, chosen])[~benign.seen.harmful]
    thresholds, omitted = [], []
    for rate in sorted(settings.rates, reverse=True):
        try:
            thresholds.append(threshold_at(logits, rate, calibration))
        except TooFewBenignError as error:
            if rate == settings.default_rate:
                raise
            logger.warning("%s; this threshold is left out", error)
            omitted.append(str(error))
    return Fitted(units, probe, choice, tuple(thresholds), calibration, tuple(omitted))


def _about(fitted: Fitted, positive: BoolArray, *roles: tuple[Dataset, Role]) -> dict[str, Any]:
    """How the fit went, for the card."""
    return {
        "prompts": len(positive),
        "positive": int(positive.sum()),
        "left_out": {
            dataset.role: {**dataset.dropped, "too long": role.seen.too_long} for dataset, role in roles
        },
        "folds": "sources" if fitted.choice.by_source else "rows",
        "inverse_regularisation": fitted.choice.strength,
        "partial_auroc_by_inverse_regularisation": {
            f"{strength:g}": score for strength, score in fitted.choice.scores.items()
        },
        "thresholds_omitted": list(fitted.omitted),
    }


def _observe(subject: Subject, dataset: Dataset, units: Units, *, judge: Judged) -> Role:
    seen = subject.observe(dataset, judge=judge)
    if not seen.prompts:
        raise FitError(f"no {dataset.role} prompt is left; {dataset.dropped or 'the files are empty'}")
    return Role(seen, subject.features(seen.tokens, units, dataset.role))


def _located_with(units_file: Path, *datasets: Dataset | None) -> tuple[DataFile, ...]:
    """The files that chose the units. Raises FitError when one is to set thresholds or to evaluate."""
    files = located_with(units_file)
    digests = {file.sha256 for file in files}
    for dataset in filter(None, datasets):
        for file in dataset.files:
            if file.sha256 in digests:
                raise FitError(
                    f"{file.name} was used to locate the units of {units_file.name} and cannot be "
                    f"{dataset.role} data; use other prompts"
                )
    return files


def _draws(units: Units, subject: Subject, seed: int) -> list[Units]:
    shape = subject.checkpoint.shape
    return [random_like(units, shape, seed=1000 * seed + i) for i in range(baselines.RANDOM_DRAWS)]


def _check_memory(units: Units, subject: Subject, prompts: int) -> None:
    width = sum(len(subject.checkpoint.shape.columns(site.kind, site.units)) for site in units)
    if width * prompts * 4 > MEMORY_LIMIT:
        raise FitError(
            f"{prompts} prompts × {width} activations take {width * prompts * 4 / 2**30:.0f} GiB, the "
            f"limit is {MEMORY_LIMIT / 2**30:.0f}; name the units to read (--units FILE) or fewer prompts"
        )


def _compare(
    roles: tuple[Role, Role, Role],
    positive: BoolArray,
    fitted: Fitted,
    settings: FitSettings,
    selections: dict[str, NDArray[np.int64]],
) -> dict[str, Any]:
    fitting, benign, held_out = roles
    quiet = ~benign.seen.harmful
    calm = tuple(p for p, keep in zip(benign.seen.prompts, quiet, strict=True) if keep)
    features = fitting.features, benign.features[quiet], held_out.features
    scorers = {
        name: baselines.columns(
            features, chosen, positive, strength=fitted.choice.strength, family=settings.family
        )
        for name, chosen in selections.items()
    }
    if settings.probe != "linear":
        # Whether the hidden layer is worth having: the other kind of probe on the same activations.
        same = selections["probe"]
        seen = fitting.seen
        choice = choose_strength(
            fitting.features[:, same], positive, seen.sources, seen.harmful, seed=settings.seed
        )
        scorers["linear probe, same units"] = baselines.columns(
            features, same, positive, strength=choice.strength
        )
    scorers["words (TF-IDF)"] = baselines.words(fitting.seen.prompts, positive, calm, held_out.seen.prompts)
    return evaluate.compare(held_out.seen, scorers, settings.rates, apart=settings.apart)


def _pack(
    subject: Subject,
    settings: FitSettings,
    fitted: Fitted,
    files: Sequence[DataFile],
    metrics: dict[str, Any],
) -> Bundle:
    checkpoint = subject.checkpoint
    measured = self_test.measure(checkpoint, fitted.units, fitted.probe, device=subject.device)
    metrics["self_test"] = {"deviation": measured.deviation, "spread": measured.spread}
    card = GuardCard(
        model=checkpoint.card(),
        label=settings.label,
        prompt_tails=subject.tails,
        sites=fitted.units,
        probe=fitted.probe.kind,
        calibration=fitted.calibration,
        thresholds=fitted.thresholds,
        default_false_positive_rate=settings.default_rate,
        data=tuple(files),
        metrics=metrics,
        self_test=measured.self_test,
        # No date: the same inputs give the same bundle, digest included.
        created={
            "neuronguard": guard.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": subject.dtype,
            "judged_tokens": str(subject.new_tokens),
            **settings.recorded(),
        },
    )
    return Bundle(card, fitted.probe)
