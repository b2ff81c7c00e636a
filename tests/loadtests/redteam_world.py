"""The red team's own small world: a tiny random model, a planted probe, invented prompts with a canary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guard.bundle import Site
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.data_rows import Prompt
from guard.fit_probes import Role
from guard.observe import Observations
from guard.resample import Bootstrap
from guard.scorer import Scorer
from loadtests import random_model
from loadtests.redteam.suffixes import Settings
from loadtests.redteam.target import Target
from loadtests.redteam.world import Sizes, World

SITES = (Site(layer=1, kind="mlp", units=tuple(range(64))),)
CANARY = "heliotrope"
WORDS = ["lamp", "river", "coat", "stone", "apple", "train", "clock", "garden", "letter", "bridge", "violin"]
SIZES = Sizes(
    asked=6,
    searched=3,
    fitted=6,
    ways=2,
    lengths=(2, 6),
    suffixes=2,
    benign=3,
    search=Settings(queries=17),
    fit_search=Settings(queries=9),
)


def make_target(directory: Path) -> Target:
    """One direction among the inputs of a layer is planted as the probe."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    }
    checkpoint = Checkpoint.open(random_model.make_model(directory, sizes))
    weight = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    return Target(
        checkpoint.load_model(), checkpoint.load_tokenizer(), SITES, Scorer.linear(weight, 0.0), 500
    )


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"Where is the {draw.choice(WORDS)} of the {CANARY} {draw.choice(WORDS)} {i}?" for i in range(count)
    ]


def role(target: Target, prompts: Sequence[str]) -> Role:
    """Prompts above the median logit are called harmful, so that the planted probe has something to see."""
    tokens = tuple(target.encode(text) for text in prompts)
    features = read_prompts(target.model, target.sites, tokens)
    logits = target.probe.logits(features)
    seen = tuple(
        Prompt((("user", text),), "harmful" if logit > np.median(logits) else "benign", "invented")
        for text, logit in zip(prompts, logits, strict=True)
    )
    return Role(Observations(seen, tokens, np.zeros(len(seen), dtype=bool), 0), features)


def make_world(target: Target) -> World:
    fit, calm, test = (role(target, texts(40, seed)) for seed in (1, 2, 3))
    quiet = ~calm.seen.harmful
    calm = role(target, [p.text for p, kept in zip(calm.seen.prompts, quiet, strict=True) if kept])
    return World(target, fit, calm, test, 0.1, lambda asked: ["Sorry, but no."] * len(asked), Bootstrap(50))
