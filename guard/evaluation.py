"""The whole of ``neuronguard evaluate``: one document about a bundle on prompts that took no part in it.

The default question is whether the *request* is harmful, by the labels of the data sets, for that is what can
be compared between models. With the model's own answers the document also holds the question whether the
*answer* will be unsafe; see ``guard.evaluate``.
"""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import guard
from guard.bundle import Bundle
from guard.data import DataError, Dataset, Problem, listed
from guard.evaluate import EvaluationError, tables
from guard.figures import RATES, Document, Scored, flag_rates, group, ranking, rate_name
from guard.observe import Observations, Subject
from guard.prompts import encode, ends_with_tail
from guard.reliability import at_prior, calibration
from guard.resample import Bootstrap, requests_of
from guard.sequence_scores import logits_of
from guard.verdict import Threshold

SCHEMA = 1
_VERBS = {
    "fit": "fit",
    "hard_negative": "fit",
    "calibrate": "calibrate",
    "threshold": "set the thresholds of",
}
_LISTED = 100
"""Most problems with data that a document lists; all are counted."""


class Evaluated(NamedTuple):
    """A bundle on an evaluation set."""

    document: Document
    scored: Scored
    """Every prompt, positive if the request is harmful."""
    pool: NDArray[np.bool_]
    """The prompts that overall figures are taken over: all but benign ones of sources kept apart."""
    thresholds: tuple[Threshold, ...]
    seen: Observations


def evaluate_bundle(
    bundle: Bundle,
    subject: Subject,
    dataset: Dataset,
    *,
    apart: Collection[str] = (),
    answers: bool = True,
    bootstrap: Bootstrap | None = None,
    strict: bool = False,
) -> Evaluated:
    """Score the prompts of ``dataset`` and measure. Without ``answers`` the model's own are not asked for.

    Raises BundleError when the bundle belongs to another model, tokenizer or chat template, EvaluationError
    when a file of the set was fitted or calibrated on, or no prompt is left, DataError when ``strict`` and a
    prompt is too long.
    """
    bootstrap = bootstrap or Bootstrap()
    card, checkpoint = bundle.card, subject.checkpoint
    bundle.verify_model(
        shape=checkpoint.shape,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
    refuse_used(bundle, dataset)
    unknown = set(apart) - set(dataset.sources("benign"))
    if unknown:
        raise EvaluationError(
            f"no benign prompt is of the source {', '.join(sorted(unknown))}, which was to be kept apart; "
            f"there are: {', '.join(dataset.sources('benign'))}"
        )
    seen = subject.observe(dataset, judge="all" if answers else "none")
    problems = (*dataset.problems, *(long := over_long(dataset, seen, subject)))
    if long and strict:
        raise DataError(listed(long, dataset.role))
    if not seen.prompts:
        raise EvaluationError(f"no prompt is left to evaluate on; left out: {dataset.dropped}")
    logits = logits_of(subject, bundle.probe, card.sites, seen.tokens, dataset.role)
    scored = Scored(logits, seen.harmful, seen.sources, requests_of(seen.prompts))
    pool = seen.harmful | ~np.isin(seen.sources, list(apart))
    document: Document = {
        "schema_version": SCHEMA,
        "question": "harmful_prompt",
        "bundle": {
            "digest": bundle.digest,
            "model": card.model.name,
            "weights_sha256": card.model.weights_sha256,
            "tokenizer_sha256": card.model.tokenizer_sha256,
            "label": card.label,
            "units": sum(len(site.units) for site in card.sites),
            "sites": len(card.sites),
            "thresholds": [threshold.model_dump() for threshold in card.thresholds],
            "default_false_positive_rate": card.default_false_positive_rate,
        },
        "overall": group(scored[pool], card.thresholds, bootstrap),
        "by_source": by(seen.sources, scored, pool, card.thresholds, bootstrap),
        "apart": sorted(apart),
    }
    document["over_sources"] = over_sources(document["by_source"])
    for key, names in (("attack", [p.attack for p in seen.prompts]), ("language", _languages(seen))):
        if any(name is not None for name in names):
            texts = np.array([name or "none" for name in names], dtype=np.str_)
            document[f"by_{key}"] = by(texts, scored, pool, card.thresholds, bootstrap)
    if answers:
        figures = unsafe_output(seen, scored, pool, card.thresholds, bootstrap)
        document["unsafe_output"] = {"judge": subject.judge, **figures}
        if (judged := subject.judgements) is not None:
            document["unsafe_output"]["judgements"] = {"name": judged.file, "sha256": judged.sha256}
        document["evaluation"] = tables(seen, logits, card.thresholds, apart=apart)
    stated = np.array([card.calibration.probability(float(logit)) for logit in logits])
    # Finite, where a probability has rounded to 0 or 1.
    stated = np.clip(stated, 1e-15, 1 - 1e-15)
    odds = np.log(stated) - np.log1p(-stated)
    target = seen.target(card.label)[pool]
    if answers or card.label == "harmful_prompt":
        both = target.any() and not target.all()
        document["calibration"] = calibration(at_prior(odds[pool], target), target) if both else None
    files = [file.model_dump() for file in (*(f for f in card.data if f.role != "evaluate"), *dataset.files)]
    document |= {
        "left_out": {
            **dataset.dropped,
            "too long": seen.too_long,
            **({"not judged": seen.not_judged} if subject.judgements is not None else {}),
        },
        "problems": {
            "by_kind": dict(Counter(problem.kind for problem in problems)),
            "first": [
                {
                    "kind": p.kind,
                    "file": p.path.name,
                    "line": p.line,
                    "text": p.text.replace(str(p.path), p.path.name),
                }
                for p in problems[:_LISTED]
            ],
        },
        "data": files,
        "made": made(subject, bootstrap),
    }
    if checkpoint.adapter is not None:
        document["adapter"] = {"name": checkpoint.adapter.name, "sha256": checkpoint.adapter.sha256}
    elif "comparison" in card.metrics and _measured_on(bundle, dataset):
        # Made when the bundle was fitted, on the same evaluation files: those figures still hold.
        document["comparison"] = card.metrics["comparison"]
    return Evaluated(document, scored, pool, card.thresholds, seen)


def refuse_used(bundle: Bundle, dataset: Dataset) -> None:
    """Raises EvaluationError when a file of ``dataset`` took part in making ``bundle``."""
    used = {file.sha256: file for file in bundle.card.data if file.role != "evaluate"}
    for file in dataset.files:
        if file.sha256 in used:
            raise EvaluationError(
                f"{file.name} was used to {_VERBS[used[file.sha256].role]} this bundle and cannot test it"
            )


def over_long(dataset: Dataset, seen: Observations, subject: Subject) -> list[Problem]:
    """What observing left out, by file and line."""
    if not seen.too_long and not seen.not_judged:
        return []
    limit = subject.checkpoint.context - subject.new_tokens
    kept, found = set(map(id, seen.prompts)), []
    for prompt in dataset.prompts:
        if id(prompt) not in kept:
            length = len(encode(subject.tokenizer, prompt.chat()))
            if length > limit:
                text = f"{length} tokens, at most {limit} fit the model's context beside an answer"
                found.append(prompt.problem("over-long prompt", text))
            elif ends_with_tail(encode(subject.tokenizer, prompt.chat()), subject.tails):
                text = "the judgements say nothing of this model's answer to it"
                found.append(prompt.problem("not judged", text))
            else:
                text = "the chat template does not end this conversation as the bundle's prompts end"
                found.append(prompt.problem("other ending", text))
    return found


def by(
    names: NDArray[np.str_],
    scored: Scored,
    pool: NDArray[np.bool_],
    thresholds: Sequence[Threshold],
    bootstrap: Bootstrap,
) -> Document:
    """The figures of each group of prompts ``names`` ``[n]``.

    ``auroc`` and its kin are about the group's own prompts; ``against_pool`` holds its harmful prompts
    against the benign prompts of all groups, which is what a source of one class can be tested by.
    """
    document: Document = {}
    for name in np.unique(names).tolist():
        here = names == name
        entry = group(scored[here], thresholds, bootstrap)
        entry["against_pool"] = None
        harmful, benign = here & scored.positive, pool & ~scored.positive
        if harmful.any() and benign.any():
            figures = ranking(scored[harmful | benign], bootstrap)
            entry["against_pool"] = {"n_benign": int(benign.sum()), **figures}
        document[name] = entry
    return document


def over_sources(sources: Mapping[str, Document]) -> Document:
    """Mean and worst over the sources that hold harmful prompts, each against the pool."""
    held = {name: entry["against_pool"] for name, entry in sources.items() if entry["against_pool"]}
    figures: dict[str, dict[str, float]] = {"auroc": {name: entry["auroc"] for name, entry in held.items()}}
    for rate in map(rate_name, RATES):
        recalls = {name: entry["tpr_at_fpr"][rate] for name, entry in held.items()}
        figures[f"tpr_at_fpr {rate}"] = recalls
    document: Document = {"sources": len(held)}
    for key, values in figures.items():
        worst = min(values, key=lambda name: values[name]) if values else None
        document[key] = {
            "mean": float(np.mean(list(values.values()))) if values else None,
            "worst": {"source": worst, "value": values[worst]} if worst is not None else None,
        }
    return document


def unsafe_output(
    seen: Observations,
    scored: Scored,
    pool: NDArray[np.bool_],
    thresholds: Sequence[Threshold],
    bootstrap: Bootstrap,
) -> Document:
    """The other question: positive is a harmful request that this model does not refuse, or of its answer to
    which a judge says that it is unsafe.

    ``overall`` holds those against everything else, ``among_harmful`` against harmful requests that the model
    refuses by itself: there, knowing a harmful request when it comes is of no help.
    """

    def of(rows: NDArray[np.bool_]) -> Document:
        part = Scored(scored.scores, seen.unsafe, scored.sources, scored.requests)[rows]
        return {
            "n_unsafe": int(part.positive.sum()),
            "n_other": int((~part.positive).sum()),
            **ranking(part, bootstrap),
            **flag_rates(part[part.positive], thresholds, "flag_rate_unsafe"),
            **flag_rates(part[~part.positive], thresholds, "flag_rate_other"),
        }

    return {
        "question": "unsafe_output",
        "overall": of(pool),
        "among_harmful": of(seen.harmful),
    }


def made(subject: Subject, bootstrap: Bootstrap) -> dict[str, str | int | None]:
    """What the figures were made with. No date: the same inputs give the same document."""
    return {
        "neuronguard": guard.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": subject.dtype,
        "judged_tokens": subject.new_tokens,
        "bootstrap_draws": bootstrap.draws,
        "seed": bootstrap.seed,
    }


def _commit() -> str | None:
    root = Path(guard.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False, timeout=10
    )
    return found.stdout.strip() or None


def _languages(seen: Observations) -> list[str | None]:
    return [prompt.language for prompt in seen.prompts]


def _measured_on(bundle: Bundle, dataset: Dataset) -> bool:
    measured = {file.sha256 for file in bundle.card.data if file.role == "evaluate"}
    return measured == {file.sha256 for file in dataset.files}
