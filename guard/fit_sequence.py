"""Fit a sequence probe on what was observed: choose how strong the penalty is, calibrate, set thresholds.

The counterpart of ``guard.fit_probes`` for probes that read every token of a prompt. Calibration, thresholds
and reference rest on the pooled logit of whole prompts.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from guard import evaluate
from guard.baselines import Scores, columns, words
from guard.fit_probes import left_out, units_of_layers
from guard.fit_settings import FitError, FitSettings
from guard.fitting import Fitted, Fitting, Probed, finished
from guard.leave_out import Choice, best_strength, choose_strength, folds_of, need_elsewhere, splits
from guard.observe import Observations, Subject
from guard.pooling import Pooling
from guard.sequence import SequenceScorer
from guard.sequence_scores import TokenActivations, logits_of, token_activations
from guard.sequence_train import Problem, train
from guard.units import columns_within, count

logger = logging.getLogger(__name__)

STRENGTHS = (1e-5, 1e-4, 1e-3)
"""Inverse regularisation strengths that are tried, as scikit-learn's C."""
FOLDS = 4
"""Times that sources are left out: each fold goes over every token."""


def fit_sequence(
    subject: Subject, fitting: Fitting, benign: Observations, settings: FitSettings
) -> Fitted[SequenceScorer]:
    """The whole of it; ``fitting.role.features`` are not looked at.

    Raises FitError, ProbeError, CalibrationError or SequenceError.
    """
    pooling = settings.pooling
    if pooling is None:
        raise FitError("a sequence probe needs a pooling")
    name, units = units_of_layers(fitting, settings)
    seen = fitting.role.seen
    activations = token_activations(subject, seen.tokens, units, "fit")
    logger.info("%s: %d units at %d sites", name, count(units), len(units))
    choice, probe = choose(activations, fitting, pooling, seed=settings.seed)
    calm = logits_of(subject, probe, units, benign.tokens, "threshold")
    where = columns_within(units, fitting.read, fitting.shape)
    about = {"sources_left_out": left_out(choice)}
    probed = Probed(units, where, probe, choice, choice.held_out, about)
    return finished(fitting, probed, calm, benign, settings)


def choose(
    activations: TokenActivations, fitting: Fitting, pooling: Pooling, *, seed: int = 0
) -> tuple[Choice, SequenceScorer]:
    """The strength that ranks left-out sources best, and the probe of all prompts at that strength.

    Both come out of one training run (``guard.sequence_train``). Raises ProbeError.
    """
    seen, positive = fitting.role.seen, fitting.positive
    folds, by_source = folds_of(seen.sources, seen.harmful, fitting.groups, seed, most=FOLDS)
    insides, problems = [], []
    for inside, rest in splits(folds, fitting.groups):
        need_elsewhere(positive, rest)
        insides.append(inside)
        problems += [Problem(rest, strength) for strength in STRENGTHS]
    problems += [Problem(np.ones(len(positive), dtype=bool), strength) for strength in STRENGTHS]
    probes = train(activations, positive, problems, pooling, seed=seed)
    held_out = np.zeros((len(STRENGTHS), len(positive)), dtype=np.float32)
    for number, inside in enumerate(insides):
        those = probes[number * len(STRENGTHS) :][: len(STRENGTHS)]
        for index in np.flatnonzero(inside).tolist():
            rows = activations.prompt(index)
            held_out[:, index] = [probe.logit(rows) for probe in those]
    choice = best_strength(STRENGTHS, held_out, positive, seen.sources, folds, by_source=by_source)
    return choice, probes[len(insides) * len(STRENGTHS) + STRENGTHS.index(choice.strength)]


def compare_sequence(
    subject: Subject,
    fitted: Fitted[SequenceScorer],
    fitting: Fitting,
    tested: tuple[Observations, Observations],
    names: tuple[str, str],
    settings: FitSettings,
) -> dict[str, Any]:
    """The probe beside one of the last token alone, on the same units, and beside words.

    ``tested`` are the threshold and the evaluation prompts, ``names`` what they are called in the progress.
    """
    seen, (benign, held_out) = fitting.role.seen, tested
    kept = np.flatnonzero(~benign.harmful).tolist()
    tokens = [benign.tokens[i] for i in kept], held_out.tokens
    units, positive = fitted.units, fitting.positive
    read = [subject.features(each, units, name) for each, name in zip(tokens, names, strict=True)]
    last = subject.features(seen.tokens, units, "fit")
    choice = choose_strength(
        last, positive, seen.sources, seen.harmful, groups=fitting.groups, seed=settings.seed
    )
    every = np.arange(last.shape[1], dtype=np.int64)
    scorers = {
        "probe": Scores(
            *(logits_of(subject, fitted.probe, units, t, n) for t, n in zip(tokens, names, strict=True))
        ),
        "last token, same units": columns(
            (last, read[0], read[1]), every, positive, strength=choice.strength
        ),
        "words (TF-IDF)": words(seen.prompts, positive, [benign.prompts[i] for i in kept], held_out.prompts),
    }
    return evaluate.compare(held_out, scorers, settings.rates, apart=settings.apart)
