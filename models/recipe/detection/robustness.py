"""How many verdicts flip when a flagged request is put in other words, and how many attacks are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.calibrate import cut
from guard.fit_probes import fit_probes
from guard.fitting import Fitting, Role
from guard.groups import requests
from guard.prompts import encode
from guard.protocol_baselines import Train, naive_bayes, words
from guard.scorer import Scorer
from guard.stats import wilson
from guard.units import every_unit
from models.recipe.detection import attacks
from models.recipe.detection.study import SETTINGS, VARIANTS, Study
from models.recipe.wording import TEST, changed

RATE = 0.01


def flips(study: Study) -> dict[str, Any]:
    """Of the harmful test prompts that a scorer flags at 1 %, the share that it no longer flags, by change.

    Scorers: the shipped probe, the same fitted without rows in other words, and words.
    """
    variant = VARIANTS[0]
    subject = study.subject(variant)
    units = every_unit(subject.checkpoint.shape, ("attention",))
    calm = study.role(variant, study.threshold, units)
    test = study.role(variant, study.evaluate, units)
    asked = test.seen.harmful
    texts = [p.text for p, harmful in zip(test.seen.prompts, asked, strict=True) if harmful]
    probes = {
        "the guard": study.bundle(variant).scorer,
        "fitted without reworded rows": _fitted(study, calm),
    }
    lexical = _word_scorers(study, calm)
    flagged, cuts = {}, {}
    for name, probe in probes.items():
        cuts[name] = cut(probe.logits(calm.features), RATE)[0]
        flagged[name] = probe.logits(test.features[asked]) >= cuts[name]
    for name, (score, at) in lexical.items():
        flagged[name] = score(texts) >= at
    any_probe = np.flatnonzero(np.any([flagged[name] for name in probes], axis=0))
    document: dict[str, Any] = {
        "flagged": {name: int(rows.sum()) for name, rows in flagged.items()},
        "changes": {},
    }
    limit = subject.checkpoint.context - subject.new_tokens
    for change in TEST:
        print(f"reworded: {change}", flush=True)
        reworded = [changed(TEST, change, text) for text in texts]
        tokens = [encode(subject.tokenizer, [{"role": "user", "content": text}]) for text in reworded]
        rows = np.array([i for i in any_probe if len(tokens[i]) <= limit])
        features = subject.features([tokens[i] for i in rows], units, change)
        entry = {}
        for name, probe in probes.items():
            was = flagged[name][rows]
            entry[name] = _lost(was, probe.logits(features) >= cuts[name])
        for name, (score, at) in lexical.items():
            entry[name] = _lost(flagged[name], score(reworded) >= at)
        document["changes"][change] = entry
    return document


def _lost(was: NDArray[np.bool_], now: NDArray[np.bool_]) -> dict[str, float]:
    return wilson(int((was & ~now).sum()), int(was.sum())).document()


def _fitted(study: Study, calm: Role) -> Scorer:
    variant = VARIANTS[0]
    shape = study.subject(variant).checkpoint.shape
    units = every_unit(shape, ("attention",))
    fit = study.role(variant, study.fitted_on(variant, study.plain), units)
    hard = np.zeros(len(fit.seen.prompts), dtype=bool)
    groups = requests(fit.seen.prompts)
    return fit_probes(Fitting(fit, fit.seen.harmful, groups, hard, units, shape), calm, SETTINGS).probe


def _word_scorers(study: Study, calm: Role) -> dict[str, Any]:
    prompts = study.fitted_on(VARIANTS[0], study.fit).prompts
    positive = np.array([p.label == "harmful" for p in prompts])
    sources = np.array([p.source for p in prompts])
    train = Train(np.array([p.text for p in prompts], dtype=object), positive, sources, positive)
    quiet = [p.text for p in calm.seen.prompts]
    found = {}
    for name, learn in (("words (naive Bayes)", naive_bayes), ("words (TF-IDF)", words)):
        score = learn(train)
        found[name] = (score, cut(score(quiet), RATE)[0])
    return found


def families(study: Study) -> dict[str, Any]:
    """Of each family of attacks, the share that the shipped bundle flags at each of its thresholds."""
    bundle = study.bundle(VARIANTS[0])
    document: dict[str, Any] = {}
    for name, family in attacks.FAMILIES.items():
        print(f"attacks: {name}", flush=True)
        found = study.scores(VARIANTS[0], bundle, attacks.read(study.data, family))
        kept = found[~np.isnan(found)]
        document[name] = {
            "n": len(kept),
            "too_long": int(np.isnan(found).sum()),
            "flagged": {
                f"{t.false_positive_rate:g}": wilson(int((kept >= t.logit).sum()), len(kept)).document()
                for t in bundle.card.thresholds
            },
        }
    return document
