"""The world of the engine's tests: a tiny random model, its bundle, and prompts that share prefixes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from guard.bundle import Bundle, Site
from loadtests import random_model

SITES = (
    Site(layer=1, kind="mlp", units=(0, 5, 17, 100, 175)),
    Site(layer=2, kind="attention", units=(1, 3)),
    Site(layer=3, kind="mlp", units=tuple(range(0, 176, 11))),
)
TAIL = (258,)
"""What the chat template puts at the end of a prompt."""
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def make_model(directory: Path, architecture: str = "llama") -> Path:
    return random_model.make_model(directory, SIZES, architecture)


def make_bundle(directory: Path, model: Path, tails: tuple[tuple[int, ...], ...] = ()) -> Bundle:
    """Without ``tails`` it takes prompts of any shape."""
    return random_model.make_bundle(directory, model, SITES, prompts(60, seed=1000), tails=tails)


def make_reference(model: Path) -> random_model.Reference:
    return random_model.Reference(model, SITES)


def prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 200) -> list[list[int]]:
    """Random prompts; a third of them share a long prefix, a quarter of them are a few tokens short."""
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(128)]
    made = []
    for i in range(count):
        body = [rng.randrange(256) for _ in range(rng.randrange(shortest, longest))]
        if i % 3 == 0:
            body = shared + body[:60]
        elif i % 4 == 1:
            body = body[: 1 + i % 3]
        made.append(body)
    return made
