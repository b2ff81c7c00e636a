"""The other question, for the model that answers about half of what it is asked: will its *answer* be unsafe?

Three probes on the same heads: fitted to the data sets' label, fitted to unsafe answers, and a product of two
probes (the request is harmful, the model complies). Beside them the words, fitted to unsafe answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from guard.figures import Scored, ranking
from guard.fit_probes import fit_probes
from guard.fitting import Fitting
from guard.groups import requests
from guard.protocol_baselines import Train, naive_bayes, words
from guard.resample import requests_of
from guard.units import every_unit
from models.recipe.detection.study import APART, SETTINGS, VARIANTS, Study

KINDS = {
    "fitted to harmful requests": SETTINGS,
    "fitted to unsafe answers": replace(SETTINGS, label="unsafe_output"),
    "product of two probes": replace(SETTINGS, label="unsafe_output", probe="product"),
}


def unsafe(study: Study) -> dict[str, Any]:
    """Ranking figures of each, over all prompts and among harmful ones alone."""
    variant = VARIANTS[0]
    shape = study.subject(variant).checkpoint.shape
    units = every_unit(shape, ("attention",))
    fit = study.role(variant, study.fitted_on(variant, study.fit), units)
    calm = study.role(variant, study.threshold, units)
    test = study.role(variant, study.evaluate, units)
    hard = np.zeros(len(fit.seen.prompts), dtype=bool)
    groups = requests(fit.seen.prompts)
    scores: dict[str, Any] = {}
    for name, settings in KINDS.items():
        print(f"unsafe output: {name}", flush=True)
        target = fit.seen.target(settings.label)
        fitted = fit_probes(Fitting(fit, target, groups, hard, units, shape), calm, settings)
        scores[name] = fitted.probe.logits(test.features)
    texts = np.array([p.text for p in fit.seen.prompts], dtype=object)
    asked = np.array([p.text for p in test.seen.prompts], dtype=object)
    for target_name in ("harmful_prompt", "unsafe_output"):
        train = Train(texts, fit.seen.target(target_name), fit.seen.sources, fit.seen.harmful)
        aim = "harmful requests" if target_name == "harmful_prompt" else "unsafe answers"
        scores[f"words (naive Bayes), {aim}"] = naive_bayes(train)(asked)
        scores[f"words (TF-IDF), {aim}"] = words(train)(asked)
    pool = test.seen.harmful | ~np.isin(test.seen.sources, APART)
    number = requests_of(test.seen.prompts)
    document: dict[str, Any] = {
        "n_unsafe": int(test.seen.unsafe.sum()),
        "n_refused_harmful": int((test.seen.harmful & test.seen.refused).sum()),
        "rows": {},
    }
    for name, found in scores.items():
        scored = Scored(found, test.seen.unsafe, test.seen.sources, number)
        document["rows"][name] = {
            "overall": ranking(scored[pool], study.bootstrap),
            "among_harmful": ranking(scored[test.seen.harmful], study.bootstrap),
        }
    return document
