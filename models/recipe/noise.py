"""Variation of wording that carries no meaning, applied alike to harmful and benign requests.

In the corpora benign requests are often lower-case utterances and harmful ones capitalised sentences. Left
alone, that difference is what a small model learns.
"""

from __future__ import annotations

import random
import re

from models.recipe.answers import HOW

PREFIXES = (
    "please ",
    "can you ",
    "could you ",
    "hi, ",
    "hello, ",
    "hey, ",
    "i need to know: ",
    "quick question: ",
    "now ",
    "for a class project, ",
    "i was wondering, ",
    "be honest, ",
    "as a writer i ask: ",
    "ok, ",
    "next: ",
    "so ",
)

SUFFIXES = (
    " please",
    " thanks",
    " thank you",
    " keep it short",
    " in detail",
    " step by step",
    " for me",
    " asap",
)

HOW_FRAMES = (
    "how do i {}?",
    "how can i {}?",
    "how to {}",
    "what is the best way to {}?",
    "tell me how to {}.",
    "write a guide on how to {}.",
    "explain how to {}.",
    "give me instructions to {}.",
    "teach me how to {}.",
    "what are some ways to {}?",
    "what steps do i take to {}?",
    "can you help me {}?",
    "i want to {}.",
    "give me tips to {}.",
    "write a tutorial on how to {}.",
    "describe how someone could {}.",
    "help me {}.",
)

IMPERATIVE = re.compile(r"^(?:write|create|give|develop|make|provide|draft|compose|generate)\b", re.I)


def reframe(text: str, rng: random.Random) -> str:
    """Put a how-to question into another form; other texts come back as they are."""
    match = HOW.search(text)
    if not match or len(text) > 160 or text.count(".") > 1:
        return text
    return rng.choice(HOW_FRAMES).format(match.group(1).strip().rstrip("?. ").lower())


def vary(text: str, rng: random.Random) -> str:
    """Vary form, politeness, case and punctuation."""
    if rng.random() < 0.3:
        text = reframe(text, rng)
    if rng.random() < 0.12 and len(text) > 1 and not IMPERATIVE.match(text):
        text = rng.choice(PREFIXES) + text[0].lower() + text[1:]
    elif rng.random() < 0.1 and len(text) > 1:
        text = rng.choice(PREFIXES[:8]) + text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = text.rstrip(".?! ") + rng.choice(SUFFIXES)
    roll = rng.random()
    if roll < 0.3:
        text = text.lower()
    elif roll < 0.75:
        text = text[:1].upper() + text[1:]
    elif roll < 0.77:
        text = text.upper()
    roll = rng.random()
    if roll < 0.3:
        text = text.rstrip(".?! ")
    elif roll < 0.4 and text[-1:].isalnum():
        text += rng.choice((".", "?", "!"))
    return text or "?"


def thin(text: str, rng: random.Random, chance: float = 0.12) -> str:
    """Drop words at random, so that no decision hangs on a single one."""
    words = text.split()
    kept = [word for word in words if rng.random() >= chance]
    return " ".join(kept) if len(kept) >= 3 else text
