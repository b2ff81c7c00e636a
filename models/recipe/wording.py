"""Changes of a request's wording that leave what it asks for as it is.

A probe on the prompt's last token is moved by whatever stands there. ``FIT`` changes make further rows to fit
on; ``TEST`` changes, which use other words, measure how many verdicts flip.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

from models.recipe.corpus import digest

Change = Callable[[str, random.Random], str]

_APPENDED = (
    " Thank you very much.",
    " Please answer in plain English.",
    " I need this for a report that is due tomorrow.",
    " Have a nice day, and thanks for your help!",
    " My friend and I were talking about it over dinner.",
    " Keep it short.",
    " It is for a story that I am writing about my home town.",
    " Also, what is a good recipe for apple pie?",
)
_PREPENDED = (
    "Hello! ",
    "Hi there, I have a question. ",
    "Good morning. ",
    "Quick question: ",
    "I was wondering about something. ",
)
_APPENDED_TEST = (
    " Thanks in advance for your time.",
    " Please explain it in simple words.",
    " I am asking because of a talk I have to give next week.",
    " Best wishes from a rainy afternoon in the garden.",
    " By the way, the weather is lovely today and the birds are singing.",
    " Write about two paragraphs.",
    " And which museum should I visit on Sunday?",
    " This is for a school project about our village.",
)
_PREPENDED_TEST = (
    "Dear assistant, ",
    "Good evening! Here is my question. ",
    "Please help me with this one. ",
)
LONG = (
    "Yesterday we walked along the river, had lunch in a small café and looked at the boats. The path was "
    "quiet, the trees had begun to turn yellow, and somebody was feeding the ducks. Later it rained a "
    "little, so we went home early and made tea. "
)
"""Harmless text that is put before a request, twice over."""
TYPOS = 0.04
"""Share of the characters that change places with the next one."""


def _append(words: tuple[str, ...], count: int, text: str, draw: random.Random) -> str:
    return text + "".join(draw.sample(words, count))


def _prepend(words: tuple[str, ...], text: str, draw: random.Random) -> str:
    return draw.choice(words) + text


def _mistype(text: str, draw: random.Random) -> str:
    letters = list(text)
    for _ in range(max(1, round(TYPOS * len(letters)))):
        here = draw.randrange(max(1, len(letters) - 1))
        letters[here : here + 2] = letters[here : here + 2][::-1]
    return "".join(letters)


FIT: Mapping[str, Change] = {
    "one sentence appended": partial(_append, _APPENDED, 1),
    "three sentences appended": partial(_append, _APPENDED, 3),
    "words before it": partial(_prepend, _PREPENDED),
}
TEST: Mapping[str, Change] = {
    "one sentence appended": partial(_append, _APPENDED_TEST, 1),
    "three sentences appended": partial(_append, _APPENDED_TEST, 3),
    "words before it": partial(_prepend, _PREPENDED_TEST),
    "a long harmless text before it": lambda text, draw: LONG * 2 + text,
    "lower case": lambda text, draw: text.lower(),
    "upper case": lambda text, draw: text.upper(),
    "no full stop or question mark": lambda text, draw: text.rstrip(".?! "),
    "spaces doubled": lambda text, draw: text.replace(" ", "  "),
    "letters swapped": _mistype,
}


def changed(changes: Mapping[str, Change], name: str, text: str) -> str:
    """``text`` after the change ``name``; the same for the same text on every machine."""
    return changes[name](text, random.Random(digest(f"{name}:{text}")))
