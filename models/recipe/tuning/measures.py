"""What is measured of a model: harmful requests answered, harmless ones refused, likelihood of answers."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from guard.checkpoint import Checkpoint
from guard.locate.causal import refusal_cost
from guard.locate.change import Text
from guard.locate.decoding import greedy
from guard.locate.sweep import log_probabilities
from guard.locate.twins import Twin
from guard.prompts import Tokens
from models.recipe.locate.helpful import texts as real_texts
from models.recipe.patching.prompts import draw, tokens
from models.recipe.tuning.material import SFT, Material

ROLES = ("harmful", "benign", "hard")
BATCH = 4096


class Measured(NamedTuple):
    """Of one model; a list has one entry a prompt or text."""

    answered: dict[str, list[int]]
    """1 for each prompt that was answered, 0 for each that was refused, by role."""
    nats: dict[str, list[float]]
    """Minus log-probability of each answer: `real` ones of sources, `own` ones of the unaligned model."""


class Measures:
    """Prompts and texts, read once."""

    def __init__(self, material: Material, roles: tuple[str, ...] = ROLES) -> None:
        self.material, self.roles = material, roles

    @cached_property
    def prompts(self) -> dict[str, list[Tokens]]:
        """Prompts of each role as token ids."""
        base, size = self.material.start(SFT), self.material.size
        return {
            role: tokens(base, draw(self.material.data, role, getattr(size, role.rpartition(" ")[2])))
            for role in self.roles
        }

    @cached_property
    def texts(self) -> dict[str, list[Text]]:
        """Benign requests with held-out answers of their sources, and with the unaligned model's own."""
        size = self.material.size
        asked = next(prompts for role, prompts in self.prompts.items() if role.endswith("benign"))[
            : size.texts
        ]
        base = Twin(self.material.start(SFT).load_model())
        answers = greedy(base, asked, new_tokens=size.new_tokens, batch_tokens=BATCH)
        own = [(prompt, answer) for prompt, answer in zip(asked, answers, strict=True) if answer]
        return {"real": real_texts(self.material.data, self.material.lab, size.texts), "own": own}

    def of(self, checkpoint: Checkpoint) -> Measured:
        """All of it, of one model."""
        twin, judge = Twin(checkpoint.load_model()), refusal_cost(checkpoint.load_tokenizer())
        answered = {}
        for role, prompts in self.prompts.items():
            said = greedy(twin, prompts, new_tokens=self.material.size.new_tokens, batch_tokens=BATCH)
            answered[role] = [int(cost) for cost in judge(prompts, said)]
        nats = {which: (-log_probabilities(twin, texts)).tolist() for which, texts in self.texts.items()}
        return Measured(answered, nats)

    def lengths(self, which: str) -> Any:
        """Tokens of each text's answer."""
        return np.array([len(answer) for _, answer in self.texts[which]])
