"""Each guard by the protocol of the detection study, and how many verdicts harmless words take away."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.figures import Scored, ranking
from guard.paired import differences
from guard.prompts import encode
from guard.resample import requests_of
from guard.stats import auroc, wilson
from models.recipe.corpus import digest
from models.recipe.detection.study import APART
from models.recipe.sequence.guards import LAST, VARIANT, Guards
from models.recipe.wording import TEST, changed

CHANGES = (
    "one sentence appended",
    "three sentences appended",
    "words before it",
    "a long harmless text before it",
)
MOST = 400
"""Requests that are reworded, of those that some guard flags."""


def rate(flags: NDArray[np.bool_]) -> dict[str, float]:
    """A share with its 95 % interval."""
    return wilson(int(flags.sum()), len(flags)).document()


def area(high: NDArray[Any], low: NDArray[Any]) -> float | None:
    """AUROC of scores that should be high against those that should be low."""
    return auroc(np.concatenate([high, low]), np.arange(len(high) + len(low)) < len(high))


def quality(guards: Guards) -> dict[str, Any]:
    """Ranking and operating points on the test sources, beside the guard of the last token."""
    study = guards.study
    seen = study.subject(VARIANT).observe(study.evaluate, judge="none")
    scores, limits = guards.logits(seen.tokens, "test sources"), guards.thresholds()
    pool = seen.harmful | ~np.isin(seen.sources, APART)
    twins = np.isin(seen.sources, APART)
    requests = requests_of(seen.prompts)
    document: dict[str, Any] = {}
    for name, found in scores.items():
        scored = Scored(found, seen.harmful, seen.sources, requests)
        flagged = found >= limits[name]
        entry = document[name] = {
            "ranking": ranking(scored[pool], study.bootstrap),
            "harmful_flagged": rate(flagged[seen.harmful]),
            "benign_flagged": rate(flagged[pool & ~seen.harmful]),
            "by_source": {},
            "twins": area(found[seen.harmful], found[twins]),
        }
        for source in np.unique(seen.sources).tolist():
            here = seen.sources == source
            each = entry["by_source"][source] = {
                "harmful": bool(seen.harmful[here].any()),
                "flagged": rate(flagged[here]),
            }
            if each["harmful"]:
                benign = found[pool & ~seen.harmful]
                each["auroc"] = area(found[here & seen.harmful], benign)
        if name != LAST:
            first = Scored(scores[LAST], seen.harmful, seen.sources, requests)[pool]
            entry["minus_last"] = differences(first, found[pool], study.bootstrap)
    return document


def left_out(guards: Guards) -> dict[str, Any]:
    """What choosing the strength has measured: fit sources, ranked by probes that did not see them."""
    document = {}
    for name, bundle in guards.bundles.items():
        found = bundle.card.metrics["fit"]["sources_left_out"]
        keys = ("folds", "inverse_regularisation", "mean_auroc", "mean_partial_auroc", "worst_source")
        document[name] = {key: found[key] for key in (*keys, "worst_partial_auroc")}
    return document


def flips(guards: Guards) -> dict[str, Any]:
    """Of the harmful test prompts that a guard flags at its 1 % threshold, the share lost by each change."""
    study = guards.study
    subject = study.subject(VARIANT)
    seen = subject.observe(study.evaluate, judge="none")
    limits = guards.thresholds()
    plain = guards.logits(seen.tokens, "test sources")
    some = np.flatnonzero(seen.harmful & np.any([plain[n] >= limits[n] for n in plain], axis=0))
    some = np.array(sorted(some, key=lambda i: digest(f"flip: {seen.prompts[i].text}"))[:MOST])
    texts = [seen.prompts[i].text for i in some]
    was = {name: found[some] >= limits[name] for name, found in plain.items()}
    document: dict[str, Any] = {
        "flagged": {name: int(rows.sum()) for name, rows in was.items()},
        "changes": {},
    }
    limit = subject.checkpoint.context - subject.new_tokens
    for change in CHANGES:
        print(f"reworded: {change}", flush=True)
        tokens = _chats(subject.tokenizer, [changed(TEST, change, text) for text in texts])
        kept = [row for row, each in enumerate(tokens) if len(each) <= limit]
        now = guards.logits([tokens[row] for row in kept], change)
        document["changes"][change] = {
            name: rate((now[name] < limits[name])[was[name][kept]]) for name in now
        }
    return document


def _chats(tokenizer: Any, texts: list[str]) -> list[tuple[int, ...]]:
    return [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
