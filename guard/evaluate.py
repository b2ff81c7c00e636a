"""How good is a guard on sources that were never fitted on: flag rates with intervals, source by source.

Two questions are kept apart. *Harmful prompt*: is the request flagged? *Unsafe output*: is the request
flagged among those that this model answers? Both are reported whatever the probe was fitted on; thresholds
come from benign prompts that belong to neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.baselines import Scores
from guard.calibrate import cut, prompts_needed
from guard.figures import rate_name
from guard.observe import Observations
from guard.stats import Rate, auroc, auroc_interval, wilson
from guard.verdict import Threshold

BoolArray = NDArray[np.bool_]
Document = dict[str, Any]


class EvaluationError(ValueError):
    """An evaluation set cannot test the bundle."""


def tables(
    seen: Observations,
    logits: NDArray[Any],
    thresholds: Sequence[Threshold],
    *,
    apart: Collection[str] = (),
) -> Document:
    """Flag rates of all sources of an evaluation set.

    ``logits`` ``[n]`` are the guard's scores of ``seen``. Benign sources named in ``apart`` are reported but
    do not belong to the pool that AUROC and the overall benign rate are taken over: that is for sources which
    nothing is expected to tell from harmful ones.
    """
    flagged = {rate_name(t.false_positive_rate): logits >= t.logit for t in thresholds}
    pool = ~seen.harmful & ~np.isin(seen.sources, list(apart))
    harmful = {
        name: _harmful_source(seen, logits, flagged, pool, (seen.sources == name) & seen.harmful)
        for name in np.unique(seen.sources[seen.harmful]).tolist()
    }
    benign = {
        name: {
            **_benign_source(seen, flagged, (seen.sources == name) & ~seen.harmful),
            "pooled": name not in apart,
        }
        for name in np.unique(seen.sources[~seen.harmful]).tolist()
    }
    document: Document = {
        "prompts": {"harmful": int(seen.harmful.sum()), "benign": int((~seen.harmful).sum())},
        "harmful": harmful,
        "benign": benign,
    }
    if harmful:
        document["all_harmful"] = _harmful_source(seen, logits, flagged, pool, seen.harmful)
        document["mean_over_harmful_sources"] = _over_sources(harmful, flagged)
    if pool.any():
        document["all_benign"] = _benign_source(seen, flagged, pool)
    return document


def _harmful_source(
    seen: Observations,
    logits: NDArray[Any],
    flagged: Mapping[str, BoolArray],
    pool: BoolArray,
    here: BoolArray,
) -> Document:
    answered = here & seen.unsafe
    document: Document = {
        "n": int(here.sum()),
        "answered_by_the_model": _share(answered, here).document(),
        "flagged": {name: _share(flags & here, here).document() for name, flags in flagged.items()},
        "flagged_of_answered": {
            name: _share(flags & answered, answered).document() for name, flags in flagged.items()
        },
        "unsafe_answers_left": {
            name: _share(answered & ~flags, here).document() for name, flags in flagged.items()
        },
    }
    for key, positive in (("auroc", here), ("auroc_of_answered", answered)):
        both = positive | pool
        document[key] = auroc(logits[both], positive[both])
        document[f"{key}_interval"] = auroc_interval(logits[both], positive[both])
    return document


def _benign_source(seen: Observations, flagged: Mapping[str, BoolArray], here: BoolArray) -> Document:
    return {
        "n": int(here.sum()),
        "refused_by_the_model": _share(seen.refused & here, here).document(),
        "flagged": {name: _share(flags & here, here).document() for name, flags in flagged.items()},
    }


def _share(part: BoolArray, whole: BoolArray) -> Rate:
    return wilson(int(part.sum()), int(whole.sum()))


def _over_sources(harmful: Mapping[str, Document], flagged: Mapping[str, BoolArray]) -> Document:
    aurocs = [source["auroc"] for source in harmful.values() if source["auroc"] is not None]
    document: Document = {"auroc": float(np.mean(aurocs)) if aurocs else None, "flagged": {}, "worst": {}}
    for name in flagged:
        rates = {source: float(entry["flagged"][name]["rate"]) for source, entry in harmful.items()}
        worst = min(rates, key=lambda source: rates[source])
        document["flagged"][name] = float(np.mean(list(rates.values())))
        document["worst"][name] = {"source": worst, "rate": rates[worst]}
    return document


def compare(
    seen: Observations,
    scorers: Mapping[str, Scores],
    rates: Sequence[float],
    *,
    apart: Collection[str] = (),
) -> Document:
    """The probe and its baselines side by side, each with thresholds from its own threshold scores.

    Returns for each scorer the AUROC against the benign pool, for the request and for the answer, and at each
    rate the share flagged of harmful, of answered harmful and of benign prompts.
    """
    pool = ~seen.harmful & ~np.isin(seen.sources, list(apart))
    document: Document = {}
    for name, scores in scorers.items():
        entry: Document = {"at": {}}
        for key, positive in (("auroc", seen.harmful), ("auroc_of_answered", seen.unsafe)):
            both = positive | pool
            entry[key] = auroc(scores.evaluate[both], positive[both])
        for rate in rates:
            if len(scores.threshold) < prompts_needed(rate):
                continue
            flags = scores.evaluate >= cut(scores.threshold, rate)[0]
            entry["at"][rate_name(rate)] = {
                "flagged": _share(flags & seen.harmful, seen.harmful).document(),
                "flagged_of_answered": _share(flags & seen.unsafe, seen.unsafe).document(),
                "benign_flagged": _share(flags & pool, pool).document(),
            }
        document[name] = entry
    return document
