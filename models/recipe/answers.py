"""Rule-based answers: copy the request's own phrase, add stock sentences of a fitting topic.

They teach the form of an answer to a model that is too small for content, cost no licence, and are empty
for any request: whatever is asked, the advice is of the kind "start with a clear goal".
"""

from __future__ import annotations

import random
import re

from models.recipe.corpus import digest
from models.recipe.stock import GENERAL, TOPICS

REFUSAL = "I'm sorry, but I can't help with that."
"""The one sentence with which an aligned model declines."""

LONGEST_COPY = 9
"""Words of the request that an answer repeats at most."""

SWAP = {
    "my": "your",
    "mine": "yours",
    "i": "you",
    "me": "you",
    "myself": "yourself",
    "i'm": "you're",
    "i've": "you've",
    "am": "are",
    "your": "my",
    "our": "your",
}

HOW = re.compile(
    r"\bhow (?:to\s+|(?:do|can|could|would|should|might|does)\s+"
    r"(?:i|you|we|one|someone|somebody|a person)\s+)(.+)",
    re.I,
)
WHY = re.compile(r"\bhow (?:do|does|did|can|could|would|should)\s+(.+)", re.I)
WHAT = re.compile(
    r"\b(?:what(?:'s| is| are| was| were)|who(?:'s| is| was| are| were)|where(?:'s| is| are)|"
    r"when(?:'s| is| was)|"
    r"explain(?! how| why)|describe|define|tell me about|overview of|summari[sz]e)\s+(.+)",
    re.I,
)
ASK = re.compile(
    r"^(?:who|what|when|where|which|why|how|in (?:what|which)|on (?:what|which)|whose)\b|\?\s*$", re.I
)
YES_NO = re.compile(
    r"^(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b(?! (?:you|i) )", re.I
)
MAKE = re.compile(
    r"\b(?:write|create|give|make|compose|draft|generate|produce|provide|develop|design|suggest|list|show)\b"
    r"(?:\s+(?:me|us))?\s+(.+)",
    re.I,
)
DO = re.compile(
    r"^(?:please\s+|can you\s+|could you\s+|i want to\s+|i need to\s+|i would like to\s+|help me\s+|"
    r"teach me to\s+)*"
    r"(?!(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|how|who|why|you|i|it|the|a|an|my|there|if|in|"
    r"on|at|for|and|so|no|yes|hi|hello|hey|ok|we|he|she|they|this|that|thank|thanks)\b)([a-z]+ .+)",
    re.I,
)


def copied(phrase: str) -> str:
    """The phrase as an answer repeats it: pronouns swapped, ended at a clause or after a few words."""
    clause = re.split(r"[.?!;:\n\"]|, (?:and|but|so)\b", phrase.strip())[0]
    words = [SWAP.get(word.lower(), word) for word in clause.split()[:LONGEST_COPY]]
    while words and words[-1].lower() in {
        "and",
        "or",
        "the",
        "a",
        "an",
        "of",
        "to",
        "in",
        "for",
        "with",
        "that",
        "on",
    }:
        words.pop()
    return " ".join(words).rstrip(",")


def topic_of(prompt: str) -> tuple[str, ...]:
    """Stock sentences of the topic whose words occur most often in the prompt."""
    words = re.findall(r"[a-z]+", prompt.lower())
    counts = {name: sum(w.startswith(keys) for w in words) for name, (keys, _) in TOPICS.items()}
    best = max(counts, key=lambda name: counts[name])
    return TOPICS[best][1] if counts[best] else GENERAL


def rule_answer(prompt: str) -> str:
    """The empty answer to a request. Deterministic: seeded by the text itself."""
    rng = random.Random(digest("answer:" + prompt))
    stock = topic_of(prompt)
    body = rng.sample(stock, min(3, len(stock)))
    if rng.random() < 0.5 and stock is not GENERAL:
        body.insert(0, rng.choice(GENERAL[:3]))
    text = " ".join(prompt.split())
    for pattern, opening, numbered in (
        (HOW, "To {}, follow these steps:", True),
        (WHY, "Here is how {}.", False),
        (MAKE, "Here is {}:", False),
        (WHAT, "Here is an overview of {}.", False),
        (YES_NO, "It depends.", False),
        (ASK, "That is a good question.", False),
        (DO, "Here is a plan to {}:", True),
    ):
        match = pattern.search(text)
        phrase = copied(match.group(1)) if match and pattern.groups else ""
        if match and not pattern.groups:
            return opening + " " + " ".join(body)
        if phrase:
            # Lower-casing the first letter keeps the opening grammatical without touching names further on.
            opening = opening.format(phrase[0].lower() + phrase[1:])
            if numbered:
                return opening + "\n" + "\n".join(f"{n}. {s}" for n, s in enumerate(body, 1))
            return opening + " " + " ".join(body)
    return "Thank you for telling me. " + " ".join(body)
