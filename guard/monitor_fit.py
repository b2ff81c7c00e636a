"""Where a monitor stops an answer: limits set on the model's own answers to benign prompts.

The model answers the benign threshold prompts, greedily. At each token of an answer a monitor sees the pooled
score of the last tokens (``guard.pooling.running``) and stops after ``debounce`` in a row at or above its
limit, so an answer is stopped by every limit up to the largest of the least of ``debounce`` scores in a row.
The limit for a rate is the cut of those over all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tqdm import tqdm

from guard.answers import answer_tokens
from guard.calibrate import cut, prompts_needed
from guard.monitor import MonitorThreshold
from guard.observe import Observations, Subject, chunks
from guard.pooling import running
from guard.prompts import Tokens
from guard.scorer import Float32Array
from guard.sequence import SequenceScorer
from guard.sequence_scores import outputs
from guard.stats import clopper_pearson
from guard.units import Units

RATES = (0.01, 0.001)
"""Shares of benign answers that may be stopped."""
DEBOUNCES = (1, 4, 16)
"""Tokens in a row."""


def monitor_thresholds(
    subject: Subject, probe: SequenceScorer, units: Units, benign: Observations, new_tokens: int
) -> tuple[tuple[MonitorThreshold, ...], dict[str, Any]]:
    """Limits for each rate and debounce, and how they were made, for the card.

    A rate that so few answers cannot support is left out, and the reason kept. Raises SequenceError.
    """
    room = subject.checkpoint.context - new_tokens
    calm = zip(benign.tokens, benign.harmful, strict=True)
    prompts = [tokens for tokens, harmful in calm if not harmful and len(tokens) <= room]
    answers = greedy_answers(subject, prompts, new_tokens)
    seen = watched(subject, probe, units, prompts, answers)
    found, omitted = limits(seen)
    about = {
        "answers": len(seen),
        "tokens": new_tokens,
        "median_tokens": float(np.median([len(scores) for scores in seen])) if seen else None,
        "omitted": omitted,
    }
    return found, about


def limits(seen: Sequence[Float32Array]) -> tuple[tuple[MonitorThreshold, ...], list[str]]:
    """A limit for each rate and debounce, of what a monitor saw of benign answers; why some are left out."""
    found, omitted = [], []
    for rate in RATES:
        if len(seen) < prompts_needed(rate):
            omitted.append(
                f"a monitor that stops {rate:g} of benign answers needs {prompts_needed(rate)} of them, "
                f"there are {len(seen)}"
            )
            continue
        for debounce in DEBOUNCES:
            highest = np.array([stopped_by(scores, debounce) for scores in seen])
            if not np.isfinite(highest).any():
                omitted.append(f"no benign answer has {debounce} tokens, so that no limit can be set")
                continue
            # Too short to be stopped: below whatever can be.
            highest[np.isneginf(highest)] = highest[np.isfinite(highest)].min() - 1.0
            limit, stopped = cut(highest, rate)
            found.append(
                MonitorThreshold(
                    false_positive_rate=rate,
                    debounce=debounce,
                    logit=limit,
                    answers=len(seen),
                    upper95=clopper_pearson(stopped, len(seen)).high,
                )
            )
    return tuple(found), omitted


def greedy_answers(subject: Subject, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
    """The model's own answers as token ids, see ``guard.answers.answer_tokens``; kept in the cache."""
    found: list[Tokens] = []
    for chunk in tqdm(chunks(prompts), "answers (monitor)", disable=not subject.progress):
        key = {**subject.answer_key(chunk, new_tokens), "as": "tokens"}
        kept = subject.cache.texts("answer-tokens", key)
        if kept is None or len(kept) != len(chunk):
            made = answer_tokens(
                subject.model, subject.tokenizer, chunk, new_tokens=new_tokens, tokens=subject.batch_tokens
            )
            kept = [" ".join(map(str, ids)) for ids in made]
            subject.cache.keep_texts("answer-tokens", key, kept)
        found += [tuple(map(int, ids.split())) for ids in kept]
    return found


def watched(
    subject: Subject,
    probe: SequenceScorer,
    units: Units,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
) -> list[Float32Array]:
    """What a monitor sees at each token of each answer.

    A token is scored when the model reads it, to make the next: neither the token that ends an answer nor
    the last one of an answer that was cut off is.
    """
    scored = [answer[:-1] for answer in answers]
    whole = [(*prompt, *answer) for prompt, answer in zip(prompts, scored, strict=True)]
    each = outputs(subject, probe.weight, probe.bias, units, whole, "monitor")
    window = probe.pooling.window
    found = []
    for part, prompt, answer in zip(each, prompts, scored, strict=True):
        # What lies further back than a window is seen by no token of the answer.
        near = part[max(0, len(prompt) + 1 - window) :]
        found.append(running(probe.pooling, near)[len(near) - len(answer) :])
    return found


def stopped_by(scores: NDArray[np.float32], debounce: int) -> float:
    """The highest limit that stops an answer whose tokens have ``scores``; -inf when it is too short."""
    if len(scores) < debounce:
        return -np.inf
    return float(sliding_window_view(scores, debounce).min(axis=1).max())


def stopped_at(scores: NDArray[np.float32], limit: float, debounce: int) -> int | None:
    """How many tokens of an answer have been scored when it is stopped; None when it is not."""
    if len(scores) < debounce:
        return None
    found = np.flatnonzero((sliding_window_view(scores, debounce) >= limit).all(axis=1))
    return int(found[0]) + debounce if len(found) else None
