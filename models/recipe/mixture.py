"""Rows of the training phases, drawn with a seed from the corpora, the templates and small talk."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.recipe.answers import REFUSAL, rule_answer
from models.recipe.corpus import Prompt, read, reserved, trained
from models.recipe.mined import FRAMES, MORE_FRAMES, Phrases
from models.recipe.noise import thin, vary
from models.recipe.skills import skill, small_talk
from models.recipe.sources import DEV_BENIGN, DEV_HARMFUL, TRAIN_BENIGN, TRAIN_HARMFUL, WIDEN_HARMFUL, Source
from models.recipe.templates import crime_prompt, template_prompt

OWN_ANSWERS = {"medquad_5k": 0.6, "gpteacher": 0.6, "llms_from_scratch_1k": 0.9, "hh_helpful_test": 0.5}
"""Sources whose own answers are used, and for what share of the draws; the rest get a rule-based answer."""

SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant.",
    "Answer briefly.",
    "You are a chatbot on a website. Be polite.",
    "Be helpful.",
    "You are an AI assistant that follows instructions.",
)

DECLINING = re.compile(r"\b(?:sorry|can(?:'|no)t|unable to|as an ai|not able to|i won't)\b", re.I)


@dataclass(frozen=True)
class Example:
    """One training row: a conversation and how to learn from it."""

    turns: tuple[tuple[str, str], ...]
    """(request, answer) pairs."""
    policy: bool = False
    """Whether the row begins with `<|policy|>`, under which harmful requests are refused."""
    on: bool = False
    """Whether the row runs with the (IA)³ vector on (co-adaptation only)."""
    cut: int | None = None
    """Learn only this many tokens of each answer; None learns all of them and `<|end|>`."""
    first: float = 1.0
    """Weight of the first token of the last answer, the one that decides between answer and refusal."""


class Draw(NamedTuple):
    """A request and a harmless answer to it."""

    text: str
    answer: str


def trimmed(answer: str, longest: int = 280) -> str | None:
    """An answer cut at the end of a sentence; None if that is impossible or if it declines."""
    text = " ".join(answer.split())
    if DECLINING.search(text) or not text:
        return None
    if len(text) <= longest:
        return text
    end = max(text.rfind(mark, 40, longest) for mark in (". ", "! ", "? "))
    return text[: end + 1] if end > 0 else None


class Pool:
    """Prompts of several sources, drawn source first and row second."""

    def __init__(self, prompts: Sequence[Prompt], sources: Sequence[Source]) -> None:
        grouped: defaultdict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            grouped[prompt.source].append(prompt)
        weight = {s.name: s.weight for s in sources}
        self.names = sorted(grouped)
        self.groups = [grouped[name] for name in self.names]
        self.weights = [weight[name] * len(grouped[name]) ** 0.5 for name in self.names]

    def draw(self, rng: random.Random) -> Prompt:
        """One prompt."""
        return rng.choice(rng.choices(self.groups, self.weights)[0])


class Mixture:
    """Everything the phases draw from."""

    def __init__(self, data: Path) -> None:
        barred = reserved(data)
        dev = {p.text for s in DEV_HARMFUL + DEV_BENIGN for p in read(data, s)}
        self.harmful_rows = [p for p in trained(data, TRAIN_HARMFUL, "train", barred) if p.text not in dev]
        self.benign_rows = [p for p in trained(data, TRAIN_BENIGN, "train", barred) if p.text not in dev]
        self.harmful_pool = Pool(self.harmful_rows, TRAIN_HARMFUL)
        self.benign_pool = Pool(self.benign_rows, TRAIN_BENIGN)
        widen = trained(data, WIDEN_HARMFUL, "train", barred)
        self.widen_pool = Pool([p for p in widen if p.text not in dev], WIDEN_HARMFUL)
        self.phrases = Phrases(part for p in self.benign_rows for part in (p.text, p.answer or ""))

    def benign(self, rng: random.Random, corpus: float = 0.5) -> Draw:
        """A harmless request: `corpus` of them from the data, most others from templates, some small talk."""
        roll = rng.random()
        if roll < 0.06:
            return Draw(*small_talk(rng))
        if roll < 0.11:
            return Draw(*skill(rng))
        if rng.random() < corpus:
            prompt = self.benign_pool.draw(rng)
            own = trimmed(prompt.answer or "") if rng.random() < OWN_ANSWERS.get(prompt.source, 0.0) else None
            if own:
                return Draw(prompt.text, own)
            text = prompt.text
        else:
            text, _ = template_prompt(rng)
        text = vary(text, rng)
        return Draw(text, rule_answer(text))

    def harmful(self, rng: random.Random) -> Draw:
        """A harmful request with the empty answer."""
        text = vary(self.harmful_pool.draw(rng).text, rng)
        return Draw(text, rule_answer(text))

    def wide(self, rng: random.Random, harmful: bool, widest: bool = False) -> Draw:
        """As `harmful` and `benign`, with more breadth: mined phrases, and crimes in a criminal's frame.

        The twin phases draw from this; it was added when the base's latent refusal turned out to take half of
        a dev source of everyday requests for harmful. `widest` adds what the last phase has on top.
        """
        if widest and harmful and rng.random() < 0.12:
            text = vary(self.widen_pool.draw(rng).text, rng)
        elif harmful and rng.random() < 0.06:
            text = vary(crime_prompt(rng), rng)
        elif not harmful and rng.random() < 0.4:
            text = vary(
                self.phrases.request(rng, MORE_FRAMES if widest and rng.random() < 0.5 else FRAMES), rng
            )
        else:
            return self.harmful(rng) if harmful else self.benign(rng)
        return Draw(text, rule_answer(text))

    def example(
        self, rng: random.Random, harmful: bool, refuse: bool, wide: bool = False, widest: bool = False
    ) -> Example:
        """A row of one or two turns, sometimes with a system line; refused only if harmful and `refuse`."""
        if wide:
            drawn, dropout = self.wide(rng, harmful, widest), 0.1
        else:
            drawn, dropout = self.harmful(rng) if harmful else self.benign(rng), 0.3 if harmful else 0.1
        text = thin(drawn.text, rng) if rng.random() < dropout else drawn.text
        answer = REFUSAL if harmful and refuse else drawn.answer
        before: tuple[tuple[str, str], ...] = ()
        roll = rng.random()
        if roll < 0.04:
            before = (tuple(self.benign(rng)),)  # type: ignore[assignment]
        elif roll < 0.08:
            text = f"{rng.choice(SYSTEM_LINES)}\n\n{text}"
        elif roll < 0.11:
            # A harmless sentence in front must change neither verdict.
            text = f"{self.benign(rng).text.rstrip('.?! ')}. {text}"
        return Example((*before, (text, answer)))


def base_rows(mixture: Mixture, count: int, seed: int) -> list[Example]:
    """Rows of the base: answers without the policy token, answers and refusals behind it."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        roll = rng.random()
        if roll < 0.38:
            rows.append(mixture.example(rng, harmful=False, refuse=False))
        elif roll < 0.68:
            row = mixture.example(rng, harmful=False, refuse=True)
            rows.append(Example(row.turns, policy=True, cut=12, first=3.0))
        elif roll < 0.86:
            row = mixture.example(rng, harmful=True, refuse=True)
            rows.append(Example(row.turns, policy=True, first=3.0))
        else:
            row = mixture.example(rng, harmful=True, refuse=False)
            rows.append(Example(row.turns, cut=None if rng.random() < 0.4 else 14))
    return rows


def twin_rows(
    mixture: Mixture, count: int, seed: int, harmful: float, off: float = 0.0, widest: bool = False
) -> list[Example]:
    """Rows of the twin phases: a share `off` runs with the vector off and answers everything."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        on = rng.random() >= off
        bad = rng.random() < (harmful if on else 0.45)
        row = mixture.example(rng, harmful=bad, refuse=on, wide=True, widest=widest)
        long = not bad and rng.random() < 0.25
        rows.append(Example(row.turns, on=on, cut=None if long or (bad and on) else 12, first=4.0))
    return rows
