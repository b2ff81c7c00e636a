"""Which prompts serve what: two pools to locate with, and prompts of unseen sources for causal checks.

Pools hold trained sources of the lab models, all with permissive licences; causal checks use sources that no
model was trained on. Nothing in the methods was chosen on either.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from guard.data import Dataset, load
from guard.prompts import Tokens, encode
from models.recipe.bundle_data import write
from models.recipe.corpus import Prompt, digest, read
from models.recipe.locate.study import Study
from models.recipe.sources import TEST_BENIGN, TEST_HARMFUL, TRAIN_BENIGN, TRAIN_HARMFUL, Label


class Pool(NamedTuple):
    """Files to draw prompts from, an equal share of each."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]


POOLS = {
    "first": Pool(
        ("advbench", "circuit_breakers_prompts", "cast_condition_pairs", "aegis_test"),
        ("hh_helpful_test", "gpteacher"),
    ),
    "second": Pool(
        ("aart", "harmfulqa", "multijail", "derta_malicious_tuning"),
        ("llms_from_scratch_1k", "medquad_5k", "clinc150"),
    ),
}
EFFECT = Pool(("simplesafetytests", "trustllm_misuse", "catqa"), ("fuzzyai_benign", "arena_hard"))
"""Test sources with permissive licences."""


def draw(data: Path, pool: Pool, label: Label, count: int, seed: int) -> list[Prompt]:
    """An equal share of each file, in an order by hash; another seed is another draw."""
    files = pool.harmful if label == "harmful" else pool.benign
    sources = [
        s
        for s in TEST_HARMFUL + TEST_BENIGN + TRAIN_HARMFUL + TRAIN_BENIGN
        if s.file in files and s.label == label
    ]
    found: list[Prompt] = []
    for number, source in enumerate(sources):
        share = count * (number + 1) // len(sources) - count * number // len(sources)
        found += sorted(read(data, source), key=lambda p: digest(f"locate:{seed}:{p.text}"))[:share]
    return found


def dataset(study: Study, pool: str, seed: int, labels: tuple[Label, ...]) -> Dataset:
    """Prompts to locate with."""
    folder = study.folder("prompts", [pool, seed, labels])
    rows = [p for label in labels for p in draw(study.data, POOLS[pool], label, study.size.locate, seed)]
    write(folder, {f"{pool}-{seed}": rows})
    return load("fit", [folder])


def tokens(study: Study, label: Label) -> list[Tokens]:
    """Prompts for causal checks, by the models' chat template."""
    count = study.size.effect if label == "harmful" else study.size.benign
    tokenizer = study.checkpoint("lab-sft").load_tokenizer()
    found = draw(study.data, EFFECT, label, count, 0)
    return [encode(tokenizer, [{"role": "user", "content": p.text}]) for p in found]
