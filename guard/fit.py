"""Make a Bundle: observe the model, choose units, fit, calibrate, set thresholds, measure, record."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sklearn
import torch
import transformers
from numpy.typing import NDArray

import guard
from guard import baselines, evaluate, self_test
from guard.bundle import Bundle, DataFile, GuardCard
from guard.data import Dataset, Prompt
from guard.fit_probes import Fitted, Fitting, Role, fit_probes
from guard.fit_settings import FitError, FitSettings
from guard.groups import near_duplicates
from guard.leave_out import choose_strength
from guard.observe import Subject
from guard.probe import BoolArray
from guard.units import (
    Units,
    columns_within,
    every_unit,
    located_with,
    random_like,
    random_units,
    read_units,
    union,
)

logger = logging.getLogger(__name__)

Judged = Literal["all", "harmful", "none"]
MEMORY_LIMIT = 12 * 2**30
"""Most bytes of activations that one role may take; beyond it units have to be named."""


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
    shape = subject.checkpoint.shape
    named: Units | None = None
    located: tuple[DataFile, ...] = ()
    if settings.units_file:
        weights = subject.checkpoint.weights_sha256
        named = read_units(settings.units_file, shape, weights_sha256=weights)
        located = _located_with(settings.units_file, threshold, evaluation)
    # Random controls are read in the same pass as the units they are for.
    everything = every_unit(shape, settings.sites) if named is None else ()
    if settings.units == "random":
        named = random_units(everything, settings.max_units, seed=settings.seed)
    draws = _draws(named, subject, settings.seed) if named else []
    read = union([named, *draws]) if named else everything
    fit, hard = _merged(fit, hard_negatives)
    fit, hard = _apart(fit, hard, [threshold, *([evaluation] if evaluation else [])])
    _check_memory(read, subject, max(len(d.prompts) for d in (fit, threshold, evaluation) if d))

    fitting = _observe(subject, fit, read, judge="harmful" if settings.label == "unsafe_output" else "none")
    benign = _observe(subject, threshold, read, judge="none")
    positive = fitting.seen.target(settings.label)
    logger.info("%d prompts to fit on, %d of them positive", len(positive), positive.sum())

    chosen = named or read
    own = columns_within(chosen, read, shape)
    whole = len(own) == fitting.features.shape[1]
    candidates = fitting if whole else Role(fitting.seen, fitting.features[:, own])
    calm = benign if whole else Role(benign.seen, benign.features[:, own])
    fitted = fit_probes(
        Fitting(
            candidates,
            positive,
            near_duplicates([prompt.text for prompt in fitting.seen.prompts]),
            np.array([prompt in hard for prompt in fitting.seen.prompts]),
            chosen,
            shape,
        ),
        calm,
        settings,
    )
    units, columns = fitted.units, columns_within(fitted.units, read, shape)

    metrics: dict[str, Any] = {"fit": _about(fitted, positive, (fit, fitting), (threshold, benign))}
    if evaluation is not None:
        held_out = _observe(subject, evaluation, read, judge="all")
        logits = fitted.probe.logits(held_out.features[:, columns])
        metrics["evaluation"] = evaluate.tables(
            held_out.seen, logits, fitted.thresholds, apart=settings.apart
        )
        selections = {"probe": columns}
        if len(columns) < fitting.features.shape[1]:
            same = draws and len(columns) == len(own)
            for number, draw in enumerate(draws if same else _draws(units, subject, settings.seed), start=1):
                selections[f"random units, draw {number}"] = columns_within(draw, read, shape)
        metrics["comparison"] = _compare((fitting, benign, held_out), positive, fitted, settings, selections)
    files = fit.files + threshold.files + (evaluation.files if evaluation else ())
    # What chose the units counts as fitted on: it can evaluate no more than the rest.
    files += tuple(file for file in located if file.sha256 not in {known.sha256 for known in files})
    return _pack(subject, settings, fitted, files, metrics)


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
        **fitted.about,
    }


def _merged(fit: Dataset, hard: Dataset | None) -> tuple[Dataset, frozenset[Prompt]]:
    """One data set to fit on, and which of it are hard negatives. Raises FitError when one is not benign."""
    if hard is None:
        return fit, frozenset()
    if harmful := hard.sources("harmful"):
        raise FitError(
            f"hard negatives are benign prompts, but those of {', '.join(harmful)} are labelled harmful; "
            "give them with --data"
        )
    dropped = Counter(fit.dropped) + Counter(hard.dropped)
    files = fit.files + tuple(file.model_copy(update={"role": "hard_negative"}) for file in hard.files)
    return Dataset("fit", fit.prompts + hard.prompts, files, dict(dropped)), frozenset(hard.prompts)


def _apart(
    fit: Dataset, hard: frozenset[Prompt], others: Sequence[Dataset]
) -> tuple[Dataset, frozenset[Prompt]]:
    """Without what is nearly equal to a prompt of another role, which exact comparison has let through."""
    prompts = [*fit.prompts, *(prompt for dataset in others for prompt in dataset.prompts)]
    groups = near_duplicates([prompt.text for prompt in prompts])
    clash = np.isin(groups[: len(fit.prompts)], groups[len(fit.prompts) :])
    if not clash.any():
        return fit, hard
    kept = tuple(prompt for prompt, out in zip(fit.prompts, clash, strict=True) if not out)
    dropped = {**fit.dropped, "nearly equal to one in another role": int(clash.sum())}
    return replace(fit, prompts=kept, dropped=dropped), hard & frozenset(kept)


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
