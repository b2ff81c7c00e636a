"""One bundle on the test sources: what `neuronguard evaluate` says of it, and of its baselines."""

from __future__ import annotations

from typing import Any

from guard.evaluation import evaluate_bundle
from guard.protocol_baselines import measure
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
