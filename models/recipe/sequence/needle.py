"""A harmful request within much benign text, or in an early turn: found, and at what price?

The benign text is made of benign test requests, one after the other, up to as many tokens as the model's
context holds; the needle takes the place of one of them. The same texts with every request benign say how
many would be refused for nothing. Needles are those test requests that some guard flags when they stand
alone: others would say nothing about length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.prompts import Tokens, encode
from models.recipe.corpus import digest
from models.recipe.detection.study import APART
from models.recipe.sequence.guards import VARIANT, Guards
from models.recipe.sequence.protocol import area, rate

PLACES = ("first", "in the middle", "last")
LENGTHS = (120, 470)
"""Tokens of the whole prompt, at most."""
NEEDLES = 40
TURNS = 4
"""Turns of a user, of which the first one holds the needle."""
REPLIES = ("Sure, here is an answer.", "I am glad to help with that.", "Of course.")
Message = dict[str, str]


def needle(guards: Guards) -> dict[str, Any]:
    """Flag rates by place and length, with AUROC against the benign texts of the same make."""
    study = guards.study
    subject = study.subject(VARIANT)
    seen = subject.observe(study.evaluate, judge="none")
    pairs = zip(seen.prompts, seen.sources, strict=True)
    calm = sorted({p.text for p, s in pairs if p.label == "benign" and s not in APART}, key=digest)
    tokenizer, limits = subject.tokenizer, guards.thresholds()
    alone = guards.logits(seen.tokens, "test sources")
    flagged = np.flatnonzero(seen.harmful & np.any([alone[n] >= limits[n] for n in alone], axis=0))
    chosen = np.array(sorted(flagged, key=lambda i: digest(f"needle: {seen.prompts[i].text}"))[:NEEDLES])
    needles = [seen.prompts[i].text for i in chosen]
    document: dict[str, Any] = {
        "context": subject.checkpoint.context,
        "needles": len(needles),
        "alone": {name: rate(found[chosen] >= limits[name]) for name, found in alone.items()},
        "texts": {},
    }

    def measure(name: str, tokens: Sequence[Tokens], benign: dict[str, NDArray[np.float64]] | None) -> Any:
        print(f"needle: {name}", flush=True)
        found = guards.logits(tokens, name)
        document["texts"][name] = {
            "tokens": float(np.median([len(each) for each in tokens])),
            "guards": {
                kind: {
                    "flagged": rate(scores >= limits[kind]),
                    **({"auroc": area(scores, benign[kind])} if benign else {}),
                }
                for kind, scores in found.items()
            },
        }
        return found

    def length(messages: list[Message]) -> int:
        return len(encode(tokenizer, messages))

    for most in LENGTHS:
        draws = [random.Random(digest(f"hay {most}: {text}")) for text in needles]
        hay = [
            _hay(text, calm, draw, lambda t: length(_turn(t)), most)
            for text, draw in zip(needles, draws, strict=True)
        ]
        tokens = [encode(tokenizer, _turn(" ".join(parts))) for parts in hay]
        benign = measure(f"benign, {most} tokens", tokens, None)
        for place in PLACES:
            texts = [_placed(parts, text, place) for parts, text in zip(hay, needles, strict=True)]
            measure(f"needle {place}, {most} tokens", [encode(tokenizer, _turn(t)) for t in texts], benign)
    chats = [_chat(text, calm) for text in needles]
    calm_chats = [_chat(None, calm, seed=text) for text in needles]
    benign = measure(f"benign, {TURNS} turns", [encode(tokenizer, chat) for chat in calm_chats], None)
    measure(f"needle in the first of {TURNS} turns", [encode(tokenizer, chat) for chat in chats], benign)
    return document


def _turn(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _hay(needle_: str, calm: Sequence[str], draw: random.Random, tokens: Any, most: int) -> list[str]:
    """Benign requests that leave room for the needle in place of one of them."""
    parts: list[str] = []
    room = most - tokens(needle_)
    while True:
        part = draw.choice(calm)
        if tokens(" ".join([*parts, part])) > room:
            return parts or [part]
        parts.append(part)


def _placed(parts: Sequence[str], text: str, place: str) -> str:
    at = {"first": 0, "in the middle": len(parts) // 2, "last": len(parts)}[place]
    return " ".join([*parts[:at], text, *parts[at:]])


def _chat(first: str | None, calm: Sequence[str], seed: str = "") -> list[Message]:
    """Turns of short benign requests with an answer each; the first may be another."""
    draw = random.Random(digest(f"chat: {first or seed}"))
    short = [text for text in calm if len(text) < 120]
    asked = [first or draw.choice(short), *(draw.choice(short) for _ in range(TURNS - 1))]
    messages: list[Message] = []
    for text in asked:
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": draw.choice(REPLIES)},
        ]
    return messages[:-1]
