"""Scores for ``neuronguard drift``: from an audit log, or of prompts that the model is run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from guard.data import DataError, Problem, expand, listed, load, rows

if TYPE_CHECKING:
    from guard.bundle import Bundle
    from guard.observe import Subject


class Scores(NamedTuple):
    """P(unsafe) of requests."""

    probabilities: list[float]
    left_out: dict[str, int]
    """Rows that hold none, by reason."""


def of_rows(paths: Sequence[Path], digest: str) -> Scores:
    """``probability`` of JSON lines; rows whose ``bundle`` is another than ``digest`` are left out.

    Raises DataError that names file and line of what is no score.
    """
    found: list[float] = []
    left_out = {"without a score": 0, "of another bundle": 0}
    problems: list[Problem] = []
    for path in expand(paths):
        for number, row in rows(path, problems):
            value = row.get("probability")
            if value is None:
                left_out["without a score"] += 1
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                text = "'probability' must be from 0 to 1"
                problems.append(Problem("no score", path, number, text))
            elif row.get("bundle") not in (None, digest):
                left_out["of another bundle"] += 1
            else:
                found.append(float(value))
    if problems:
        raise DataError(listed(problems, "score"))
    return Scores(found, left_out)


def of_prompts(paths: Sequence[Path], bundle: Bundle, subject: Subject) -> Scores:
    """P(unsafe) of the benign prompts in data files. Raises DataError, or BundleError for another model."""
    checkpoint, card = subject.checkpoint, bundle.card
    bundle.verify_model(
        shape=checkpoint.shape,
        weights_sha256=checkpoint.weights_sha256,
        tokenizer_sha256=checkpoint.tokenizer_sha256,
    )
    dataset = load("evaluate", paths)
    seen = subject.observe(dataset, judge="none")
    benign = [i for i, prompt in enumerate(seen.prompts) if prompt.label == "benign"]
    left_out = {**dataset.dropped, "too long": seen.too_long, "harmful": len(seen.prompts) - len(benign)}
    if not benign:
        return Scores([], left_out)
    from guard.sequence_scores import logits_of

    tokens = [seen.tokens[i] for i in benign]
    logits = logits_of(subject, bundle.probe, card.sites, tokens, dataset.role)
    return Scores([card.calibration.probability(float(logit)) for logit in logits], left_out)
