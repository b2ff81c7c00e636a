"""Leave one source out: every harmful source, ranked by probes and words that were fitted without it.

All are tested against one benign pool that is never fitted on. Sources that the *model* was trained on are
told apart from those it never saw: leaving the first kind out of the probe does not make them new.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.figures import Scored, ranking
from guard.fitting import Role
from guard.groups import requests
from guard.observe import Observations
from guard.probe import BoolArray, fit_probe
from guard.protocol_baselines import Train, naive_bayes, words
from guard.resample import requests_of
from guard.units import every_unit
from models.recipe.detection.study import APART, VARIANTS, Study
from models.recipe.sources import DEV_HARMFUL, TEST_HARMFUL, registered

SCORERS = ("the guard's heads", "words (n-gram naive Bayes)", "words (TF-IDF, logistic regression)")


def left_out(study: Study, strength: float) -> dict[str, Any]:
    """Figures of every harmful source by scorer; ``strength`` is the bundle's inverse regularisation."""
    variant = VARIANTS[0]
    units = every_unit(study.subject(variant).checkpoint.shape, ("attention",))
    fit = study.role(variant, study.fitted_on(variant, study.fit), units)
    test = study.role(variant, study.evaluate, units)
    pool = ~test.seen.harmful & ~np.isin(test.seen.sources, APART)
    unseen = set(registered(DEV_HARMFUL + TEST_HARMFUL))
    groups = requests(fit.seen.prompts)
    document: dict[str, Any] = {}
    everything = np.ones(len(fit.seen.prompts), dtype=bool)
    whole = _scores(fit, everything, test, strength)
    for name in sorted(set(test.seen.sources[test.seen.harmful].tolist())):
        here = test.seen.harmful & (test.seen.sources == name)
        both = here | pool
        document[name] = _figures(study, test, here, pool, {key: s[both] for key, s in whole.items()})
    # Rows in other words help to fit; a source is ranked as it is.
    own = np.array([prompt.pair in (None, prompt.text) for prompt in fit.seen.prompts])
    for name in sorted(set(fit.seen.sources[fit.seen.harmful].tolist())):
        here = fit.seen.harmful & own & (fit.seen.sources == name)
        # A request that stands in another source as well is not fitted on there either.
        rest = (fit.seen.sources != name) & ~np.isin(groups, groups[here])
        print(f"without {name}", flush=True)
        joined = _joined(fit, here, test, pool)
        figures = _scores(fit, rest, joined, strength)
        positive = np.arange(len(joined.seen.prompts)) < here.sum()
        document[name] = _figures(study, joined, positive, ~positive, figures)
    return {name: {"unseen_by_the_model": name in unseen, **entry} for name, entry in document.items()}


def _joined(fit: Role, here: BoolArray, test: Role, pool: BoolArray) -> Role:
    """The prompts left out, then the benign pool."""
    prompts = (*_those(fit.seen.prompts, here), *_those(test.seen.prompts, pool))
    tokens = (*_those(fit.seen.tokens, here), *_those(test.seen.tokens, pool))
    refused = np.concatenate([fit.seen.refused[here], test.seen.refused[pool]])
    features = np.concatenate([fit.features[here], test.features[pool]])
    return Role(Observations(prompts, tokens, refused, 0), features)


def _those(values: tuple[Any, ...], rows: BoolArray) -> tuple[Any, ...]:
    return tuple(value for value, keep in zip(values, rows, strict=True) if keep)


def _scores(fit: Role, rows: BoolArray, test: Role, strength: float) -> dict[str, NDArray[Any]]:
    positive = fit.seen.harmful[rows]
    texts = np.array([p.text for p in fit.seen.prompts], dtype=object)[rows]
    asked = np.array([p.text for p in test.seen.prompts], dtype=object)
    train = Train(texts, positive, fit.seen.sources[rows], positive)
    heads = fit_probe(fit.features[rows], positive, strength=strength).logits(test.features)
    return dict(zip(SCORERS, (heads, naive_bayes(train)(asked), words(train)(asked)), strict=True))


def _figures(
    study: Study, test: Role, positive: BoolArray, pool: BoolArray, scores: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    both = positive | pool
    prompts = _those(test.seen.prompts, both)
    requests = requests_of(prompts)
    found: dict[str, Any] = {"n": int(positive.sum())}
    for name, each in scores.items():
        scored = Scored(each, positive[both], test.seen.sources[both], requests)
        found[name] = {key: ranking(scored, study.bootstrap)[key] for key in FIGURES}
    return found


FIGURES = ("auroc", "auroc_interval", "tpr_at_fpr", "tpr_at_fpr_interval")


def summary(document: dict[str, Any], unseen: bool) -> dict[str, Any]:
    """Mean and worst over the sources of one kind, by scorer."""
    chosen = {name: entry for name, entry in document.items() if entry["unseen_by_the_model"] == unseen}
    found: dict[str, Any] = {"sources": len(chosen)}
    for scorer in SCORERS:
        areas = {name: entry[scorer]["auroc"] for name, entry in chosen.items()}
        recalls = {name: entry[scorer]["tpr_at_fpr"]["0.01"] for name, entry in chosen.items()}
        found[scorer] = {
            key: {
                "mean": float(np.mean(list(values.values()))),
                "worst": min(values.values()),
                "worst_source": min(values, key=lambda name: values[name]),
            }
            for key, values in (("auroc", areas), ("tpr_at_1_percent", recalls))
        }
    return found
