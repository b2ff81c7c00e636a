"""Which prompts and texts serve what. Settings are chosen on dev sources, figures are of test sources.

Units are located on sources that the models were trained on. No model was trained on a dev or a test source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from guard.checkpoint import Checkpoint
from guard.prompts import Tokens, encode
from models.recipe.corpus import Prompt, digest, read
from models.recipe.locate.prompts import POOLS
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_HARMFUL,
    Source,
)


class Role(NamedTuple):
    """Prompts of one kind."""

    sources: tuple[Source, ...]
    about: str


def _named(sources: Sequence[Source], *files: str) -> tuple[Source, ...]:
    return tuple(source for source in sources if source.file in files)


ROLES = {
    "locate": Role(_named(TRAIN_HARMFUL, *POOLS["first"].harmful), "harmful, trained sources"),
    "dev harmful": Role(DEV_HARMFUL, "harmful, dev sources"),
    "dev benign": Role(_named(DEV_BENIGN, "safe_unlearning"), "benign, dev source"),
    "harmful": Role(
        _named(TEST_HARMFUL, "simplesafetytests", "trustllm_misuse", "catqa"), "harmful, test sources"
    ),
    "benign": Role(_named(TEST_BENIGN, "fuzzyai_benign", "arena_hard"), "benign, test sources"),
    "hard": Role(
        _named(TEST_BENIGN, "oktest", "structural_twins"), "benign in the words of harmful requests, test"
    ),
}
"""What each set of prompts is drawn from."""


def draw(data: Path, role: str, count: int) -> list[Prompt]:
    """An equal share of each source, or all it has, in an order by hash."""
    sources = ROLES[role].sources
    found: list[Prompt] = []
    for number, source in enumerate(sources):
        share = count * (number + 1) // len(sources) - count * number // len(sources)
        found += sorted(read(data, source), key=lambda p: digest(f"patch:{p.text}"))[:share]
    return found


def tokens(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> list[Tokens]:
    """The prompts by the model's chat template."""
    tokenizer = checkpoint.load_tokenizer()
    return [encode(tokenizer, [{"role": "user", "content": p.text}]) for p in prompts]
