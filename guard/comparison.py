"""Two bundles on the same prompts: which is better, and is the difference more than chance?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from guard.bundle import Bundle
from guard.data import Dataset
from guard.evaluate import EvaluationError
from guard.evaluation import made, refuse_used
from guard.figures import Document, Scored, rate_name
from guard.observe import Subject
from guard.paired import differences, holm, mcnemar
from guard.report import QUESTIONS, table
from guard.resample import Bootstrap, requests_of
from guard.sequence_scores import logits_of

Question = Literal["harmful_prompt", "unsafe_output"]


def compare_bundles(
    bundles: tuple[Bundle, Bundle],
    subjects: tuple[Subject, Subject],
    dataset: Dataset,
    *,
    question: Question = "harmful_prompt",
    apart: Collection[str] = (),
    bootstrap: Bootstrap | None = None,
) -> Document:
    """Score the prompts that both models can take, and test the differences, second minus first.

    For ``unsafe_output`` both bundles must belong to one model, for an answer is one model's. Raises
    BundleError when a bundle does not belong to its model, EvaluationError when a file was fitted on.
    """
    bootstrap = bootstrap or Bootstrap()
    for bundle, subject in zip(bundles, subjects, strict=True):
        bundle.verify_model(
            shape=subject.checkpoint.shape,
            weights_sha256=subject.checkpoint.weights_sha256,
            tokenizer_sha256=subject.checkpoint.tokenizer_sha256,
        )
        refuse_used(bundle, dataset)
    first, second = (bundle.card.model.weights_sha256 for bundle in bundles)
    answers = question == "unsafe_output"
    if answers and first != second:
        raise EvaluationError(
            "the bundles belong to two models, and whether an answer is unsafe is a question about one; "
            "compare them on harmful_prompt"
        )
    seen = [subject.observe(dataset, judge="harmful" if answers else "none") for subject in subjects]
    both = set(map(id, seen[0].prompts)) & set(map(id, seen[1].prompts))
    kept = [np.array([id(p) in both for p in each.prompts], dtype=bool) for each in seen]
    if not both:
        raise EvaluationError(f"no prompt is left that both models can take; left out: {dataset.dropped}")
    logits = [
        logits_of(subject, bundle.probe, bundle.card.sites, each.tokens, dataset.role)[rows]
        for bundle, subject, each, rows in zip(bundles, subjects, seen, kept, strict=True)
    ]
    prompts = [p for p, keep in zip(seen[0].prompts, kept[0], strict=True) if keep]
    positive = seen[0].target(question)[kept[0]]
    sources = seen[0].sources[kept[0]]
    pool = positive | ~np.isin(sources, list(apart)) | seen[0].harmful[kept[0]]
    scored = Scored(logits[0], positive, sources, requests_of(prompts))
    document: Document = {
        "schema_version": 1,
        "question": question,
        "a": _about(bundles[0]),
        "b": _about(bundles[1]),
        "n_positive": int(positive[pool].sum()),
        "n_negative": int((~positive[pool]).sum()),
        "n_requests": len(np.unique(scored.requests[pool])),
        "overall": differences(scored[pool], logits[1][pool], bootstrap),
        "by_source": {},
        "flags": _flags(bundles, logits, positive, pool),
        "apart": sorted(apart),
        "left_out": {**dataset.dropped, "too long for a model": len(dataset.prompts) - len(both)},
        "data": [file.model_dump() for file in dataset.files],
        "made": made(subjects[0], bootstrap),
    }
    for name in np.unique(sources[positive]).tolist():
        rows = ((sources == name) & positive) | (pool & ~positive)
        found = differences(scored[rows], logits[1][rows], bootstrap)
        if found is not None:
            n = int((positive & (sources == name)).sum())
            document["by_source"][name] = {"n_positive": n, **found}
    return document


def _about(bundle: Bundle) -> Document:
    card = bundle.card
    return {
        "digest": bundle.digest,
        "model": card.model.name,
        "weights_sha256": card.model.weights_sha256,
        "label": card.label,
        "units": sum(len(site.units) for site in card.sites),
    }


def _flags(bundles: Sequence[Bundle], logits: Sequence[Any], positive: Any, pool: Any) -> Document:
    """McNemar's test at each rate that both bundles have a threshold for, positives and negatives apart."""
    points = [{rate_name(t.false_positive_rate): t.logit for t in b.card.thresholds} for b in bundles]
    document: Document = {}
    for rate in (name for name in points[0] if name in points[1]):
        flags = [each >= point[rate] for each, point in zip(logits, points, strict=True)]
        document[rate] = {
            kind: mcnemar(flags[0][rows], flags[1][rows])
            for kind, rows in (("positive", pool & positive), ("negative", pool & ~positive))
        }
    tests = [entry for at in document.values() for entry in at.values()]
    for entry, adjusted in zip(tests, holm([entry["p_value"] for entry in tests]), strict=True):
        entry["p_value_holm"] = adjusted
    return document


def markdown(document: Document) -> str:
    """The comparison as Markdown."""
    lines = [
        "# Two bundles on the same prompts",
        "",
        *(
            f"- {name}: `{document[name]['digest'][:12]}`, {document[name]['units']} units, model "
            f"`{document[name]['model']}`, fitted to `{document[name]['label']}`"
            for name in ("a", "b")
        ),
        "",
        f"Question: {QUESTIONS[document['question']]}. {document['n_positive']} positive and "
        f"{document['n_negative']} other prompts, {document['n_requests']} requests. Differences are b − a, "
        "with 95 % intervals by a paired bootstrap over requests within sources.",
        "",
    ]
    if document["overall"] is None:
        lines.append("One class is missing, so that there is no ranking to compare.")
    else:
        rows = [("all", document["overall"]), *document["by_source"].items()]
        heads = ["positives of", "AUROC a", "AUROC b", "b − a", "DeLong p"]
        rates = list(document["overall"]["tpr_at_fpr"])
        heads += [f"recall at {100 * float(rate):g} %, b − a" for rate in rates]
        lines += table(
            heads,
            (
                [
                    name,
                    f"{entry['auroc']['a']:.3f}",
                    f"{entry['auroc']['b']:.3f}",
                    _difference(entry["auroc"]),
                    f"{entry['auroc']['delong_p_value']:.2g}" if "delong_p_value" in entry["auroc"] else "–",
                    *(_difference(entry["tpr_at_fpr"][rate]) for rate in rates),
                ]
                for name, entry in rows
            ),
        )
    if document["flags"]:
        lines += ["", "At each bundle's own thresholds (McNemar's exact test, p adjusted after Holm):", ""]
        heads = ["threshold, prompts", "n", "flagged by a", "by b", "only a", "only b", "p", "p, adjusted"]
        lines += table(
            heads,
            (
                [
                    f"{100 * float(rate):g} %, {kind}",
                    *(entry["n"], *(_share(entry[name]) for name in "ab"), entry["only_a"], entry["only_b"]),
                    *(f"{entry[key]:.2g}" for key in ("p_value", "p_value_holm")),
                ]
                for rate, at in document["flags"].items()
                for kind, entry in at.items()
            ),
        )
    return "\n".join(lines) + "\n"


def _difference(entry: Document) -> str:
    low, high = entry["difference_interval"]
    return f"{entry['difference']:+.3f} [{low:+.3f} to {high:+.3f}]"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
