"""What is asked, and which of it is to be refused.

The texts are questions of everyday life, three at a time. A guard is not measured here, only its speed: the
bundle's threshold is moved to where it refuses a fifth of them, and these are called *harmful* from there on.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from guard.bundle import Bundle
from loadtests.batches import with_threshold
from loadtests.random_model import Reference

SHARE = 0.2
"""Of the candidates that are refused."""


class Prompts(NamedTuple):
    """Texts of user messages, no two of them equal."""

    benign: list[str]
    harmful: list[str]


def candidates(count: int, seed: int = 0) -> list[str]:
    """``count`` different texts of three questions each."""
    file = Path(__file__).parent.parent / "traffic" / "prompts.json"
    questions = json.loads(file.read_text("utf-8"))["everyday"]
    triples = list(itertools.permutations(questions, 3))
    return [" ".join(triple) for triple in random.Random(seed).sample(triples, count)]


def divide(model: Path, bundle: Bundle, directory: Path, benign: int, harmful: int) -> tuple[Prompts, Path]:
    """Prompts of both kinds, and the bundle that tells them apart, saved in ``directory``.

    Scores come from transformers. Those within a thousandth of the threshold are left out: engines may round
    otherwise.
    """
    texts = candidates(int(max(harmful / SHARE, benign / (1 - SHARE)) * 1.1) + 2)
    tokenizer, reference = AutoTokenizer.from_pretrained(model), Reference(model, bundle.card.sites)
    logits = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        logits.append(float(bundle.logits(reference.features(ids)[None])[0]))
    scores = [bundle.card.calibration.probability(logit) for logit in logits]
    cut = float(np.quantile(scores, 1 - SHARE))
    room = 1e-3 * (max(scores) - min(scores))
    kinds = Prompts(
        [text for text, score in zip(texts, scores, strict=True) if score < cut - room][:benign],
        [text for text, score in zip(texts, scores, strict=True) if score > cut + room][:harmful],
    )
    if len(kinds.benign) < benign or len(kinds.harmful) < harmful:
        raise ValueError(
            f"only {len(kinds.benign)} benign and {len(kinds.harmful)} harmful prompts were found"
        )
    return kinds, with_threshold(bundle, directory, cut)
