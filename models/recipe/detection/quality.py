"""One bundle on the test sources: what `neuronguard evaluate` says of it, and of its baselines."""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.evaluation import evaluate_bundle
from guard.figures import Scored, ranking
from guard.protocol_baselines import measure
from guard.resample import requests_of
from models.recipe.detection.study import APART, VARIANTS, Study

KEPT = ("bundle", "overall", "by_source", "over_sources", "calibration", "unsafe_output")


def quality(study: Study, variant: str) -> dict[str, Any]:
    """Figures of a model's bundle; for the first model with all baselines and the unsafe-output question."""
    bundle, subject = study.bundle(variant), study.subject(variant)
    whole = variant == VARIANTS[0]
    found = evaluate_bundle(
        bundle, subject, study.evaluate, apart=APART, answers=whole, bootstrap=study.bootstrap
    )
    document = {key: found.document[key] for key in KEPT if key in found.document}
    if whole:
        document["baselines"], _ = measure(bundle, subject, found, study.bootstrap, study.fit)
    return document


def twins(study: Study) -> dict[str, Any]:
    """The harmful test requests against the structural twins: chance is 0.5.

    The twins' own originals belong to sources that are fitted on, and would flatter.
    """
    variant = VARIANTS[0]
    bundle = study.bundle(variant)
    test = study.role(variant, study.evaluate, bundle.card.sites)
    both = test.seen.harmful | np.isin(test.seen.sources, APART)
    scored = Scored(
        bundle.logits(test.features),
        test.seen.harmful,
        test.seen.sources,
        requests_of(test.seen.prompts),
    )
    return ranking(scored[both], study.bootstrap)
