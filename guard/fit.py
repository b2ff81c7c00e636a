"""Make a Bundle: observe the model, choose units, fit, calibrate, set thresholds, measure, record."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
import transformers
from numpy.typing import NDArray

import guard
from guard import baselines, evaluate, self_test
from guard.bundle import Bundle, DataFile, GuardCard
from guard.data import Dataset
from guard.fit_plan import Plan, prepare
from guard.fit_probes import fit_probes
from guard.fit_sequence import compare_sequence, fit_sequence
from guard.fit_settings import FitError, FitSettings
from guard.fitting import Fitted, Fitting, Role
from guard.groups import requests
from guard.leave_out import choose_strength
from guard.monitor import MonitorThreshold
from guard.monitor_fit import monitor_thresholds
from guard.observe import Judged, Observations, Subject
from guard.probe import BoolArray
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.sequence_scores import logits_of, refuse_reader
from guard.units import Units, columns_within

logger = logging.getLogger(__name__)


def fit_bundle(
    subject: Subject,
    settings: FitSettings,
    fit: Dataset,
    threshold: Dataset,
    evaluation: Dataset | None = None,
    hard_negatives: Dataset | None = None,
) -> Bundle:
    """The whole of ``neuronguard fit``. Raises FitError, ProbeError, CalibrationError or UnitsError.

    ``hard_negatives`` are benign prompts that look harmful; they are fitted on like the others, and reported
    apart. Prompts nearly equal to one that sets thresholds or evaluates are not fitted on.
    """
    plan = prepare(subject, settings, fit, threshold, evaluation, hard_negatives)
    fit = plan.fit
    of_kind = _of_last_token if settings.pooling is None else _of_every_token
    fitted, metrics, monitor = of_kind(subject, settings, plan, threshold, evaluation)
    files = fit.files + threshold.files + (evaluation.files if evaluation else ())
    # What chose the units counts as fitted on: it can evaluate no more than the rest.
    files += tuple(file for file in plan.located if file.sha256 not in {known.sha256 for known in files})
    return _pack(subject, settings, fitted, files, metrics, monitor)


def _of_last_token(
    subject: Subject, settings: FitSettings, plan: Plan, threshold: Dataset, evaluation: Dataset | None
) -> _Made:
    shape, read, fit = subject.checkpoint.shape, plan.read, plan.fit
    if subject.reader is not None:
        subject.reader.expect(read)
    fitting = _read(subject, fit, read, judge=settings.judged)
    benign = _read(subject, threshold, read, judge="none")
    own = columns_within(plan.units, read, shape)
    whole = len(own) == fitting.features.shape[1]
    candidates = fitting if whole else Role(fitting.seen, fitting.features[:, own])
    calm = benign if whole else Role(benign.seen, benign.features[:, own])
    about = _fitting(candidates, settings, plan, subject)
    positive = about.positive
    fitted = fit_probes(about, calm, settings)
    units, columns = fitted.units, columns_within(fitted.units, read, shape)

    seen = (fit, fitting.seen), (threshold, benign.seen)
    metrics: dict[str, Any] = {"fit": _about(fitted, positive, *seen)}
    if evaluation is not None:
        held_out = _read(subject, evaluation, read, judge="all")
        scored = fitted.probe.logits(held_out.features[:, columns])
        metrics["evaluation"] = evaluate.tables(
            held_out.seen, scored, fitted.thresholds, apart=settings.apart
        )
        selections = {"probe": columns}
        if len(columns) < fitting.features.shape[1]:
            for number, draw in enumerate(plan.controls(units, shape, settings.seed), start=1):
                selections[f"random units, draw {number}"] = columns_within(draw, read, shape)
        metrics["comparison"] = _compare((fitting, benign, held_out), positive, fitted, settings, selections)
    return _Made(fitted, metrics, ())


def _of_every_token(
    subject: Subject, settings: FitSettings, plan: Plan, threshold: Dataset, evaluation: Dataset | None
) -> _Made:
    refuse_reader(subject)
    fitting = _observe(subject, plan.fit, judge=settings.judged)
    benign = _observe(subject, threshold, judge="none")
    about = _fitting(Role(fitting, np.empty((0, 0), np.float32)), settings, plan, subject)
    fitted = fit_sequence(subject, about, benign, settings)
    metrics: dict[str, Any] = {
        "fit": _about(fitted, about.positive, (plan.fit, fitting), (threshold, benign))
    }
    monitor: tuple[MonitorThreshold, ...] = ()
    if settings.monitor_tokens:
        monitor, metrics["fit"]["monitor"] = monitor_thresholds(
            subject, fitted.probe, fitted.units, benign, settings.monitor_tokens
        )
    if evaluation is not None:
        held_out = _observe(subject, evaluation, judge="all")
        scored = logits_of(subject, fitted.probe, fitted.units, held_out.tokens, evaluation.role)
        metrics["evaluation"] = evaluate.tables(held_out, scored, fitted.thresholds, apart=settings.apart)
        metrics["comparison"] = compare_sequence(
            subject, fitted, about, (benign, held_out), (threshold.role, evaluation.role), settings
        )
    return _Made(fitted, metrics, monitor)


class _Made(NamedTuple):
    fitted: Fitted[Scorer] | Fitted[SequenceScorer]
    metrics: dict[str, Any]
    monitor: tuple[MonitorThreshold, ...]


def _fitting(role: Role, settings: FitSettings, plan: Plan, subject: Subject) -> Fitting:
    seen = role.seen
    positive = seen.target(settings.label)
    logger.info("%d prompts to fit on, %d of them positive", len(positive), positive.sum())
    hard = np.array([prompt in plan.hard for prompt in seen.prompts])
    return Fitting(role, positive, requests(seen.prompts), hard, plan.units, subject.checkpoint.shape)


def _about(
    fitted: Fitted[Scorer] | Fitted[SequenceScorer],
    positive: BoolArray,
    *roles: tuple[Dataset, Observations],
) -> dict[str, Any]:
    """How the fit went, for the card."""
    return {
        "prompts": len(positive),
        "positive": int(positive.sum()),
        "left_out": {
            dataset.role: {
                **dataset.dropped,
                "too long": seen.too_long,
                **({"not judged": seen.not_judged} if seen.not_judged else {}),
            }
            for dataset, seen in roles
        },
        "folds": "sources" if fitted.choice.by_source else "rows",
        "inverse_regularisation": fitted.choice.strength,
        "partial_auroc_by_inverse_regularisation": {
            f"{strength:g}": score for strength, score in fitted.choice.scores.items()
        },
        "thresholds_omitted": list(fitted.omitted),
        **fitted.about,
    }


def _observe(subject: Subject, dataset: Dataset, *, judge: Judged) -> Observations:
    seen = subject.observe(dataset, judge=judge)
    if not seen.prompts:
        raise FitError(f"no {dataset.role} prompt is left; {dataset.dropped or 'the files are empty'}")
    return seen


def _read(subject: Subject, dataset: Dataset, units: Units, *, judge: Judged) -> Role:
    seen = _observe(subject, dataset, judge=judge)
    return Role(seen, subject.features(seen.tokens, units, dataset.role))


def _compare(
    roles: tuple[Role, Role, Role],
    positive: BoolArray,
    fitted: Fitted[Scorer],
    settings: FitSettings,
    selections: dict[str, NDArray[np.int64]],
) -> dict[str, Any]:
    fitting, benign, held_out = roles
    quiet = ~benign.seen.harmful
    calm = tuple(p for p, keep in zip(benign.seen.prompts, quiet, strict=True) if keep)
    features = fitting.features, benign.features[quiet], held_out.features
    scorers = {}
    for name, chosen in selections.items():
        if name == "probe":
            probe = fitted.probe
            scorers[name] = baselines.Scores(*(probe.logits(part[:, chosen]) for part in features[1:]))
        else:
            scorers[name] = baselines.columns(
                features, chosen, positive, strength=fitted.choice.strength, family=settings.family
            )
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
    fitted: Fitted[Scorer] | Fitted[SequenceScorer],
    files: Sequence[DataFile],
    metrics: dict[str, Any],
    monitor: tuple[MonitorThreshold, ...],
) -> Bundle:
    checkpoint = subject.checkpoint
    if subject.reader is not None and isinstance(fitted.probe, Scorer):
        measured = self_test.measure_served(subject, fitted.units, fitted.probe)
    else:
        measured = self_test.measure(
            checkpoint, fitted.units, fitted.probe, device=subject.device, cache=subject.cache
        )
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
        reference=fitted.reference,
        pooling=settings.pooling,
        monitor=monitor,
        # No date: the same inputs give the same bundle, digest included.
        created={
            "neuronguard": guard.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({"capture": "engine"} if subject.reader is not None else {}),
            "dtype": subject.dtype,
            "judged_tokens": str(subject.new_tokens),
            **(
                {"judge": subject.judge, "judgements": judged.sha256}
                if (judged := subject.judgements)
                else {}
            ),
            **settings.recorded(),
        },
    )
    return Bundle(card, fitted.probe)
