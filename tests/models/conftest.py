"""A data folder of harmless invented prompts, in which every registered file exists."""

import gzip
import json
import random
from pathlib import Path

import pytest

from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    WIDEN_HARMFUL,
    Source,
)

ALL = DEV_BENIGN + DEV_HARMFUL + TEST_BENIGN + TEST_HARMFUL + TRAIN_BENIGN + TRAIN_HARMFUL + WIDEN_HARMFUL
NOUNS = [
    "lamp",
    "river",
    "coat",
    "stone",
    "apple",
    "train",
    "clock",
    "garden",
    "letter",
    "bridge",
    "violin",
    "cloud",
]
VERBS = ["paint", "move", "sell", "find", "draw", "wash", "carry", "count", "lift", "open", "turn", "mend"]


def invented_row(source: Source, number: int, rng: random.Random) -> dict[str, object]:
    """A row the source accepts. "Harmful" ones zorb, a word that stands for anything bad here."""
    words = f"{rng.choice(VERBS)} the {rng.choice(NOUNS)} and the {rng.choice(NOUNS)} {source.file} {number}"
    prompt = f"How do I zorb and {words}?" if source.label == "harmful" else f"How do I {words}?"
    row: dict[str, object] = {"prompt": prompt, "label": source.label, "response": None}
    if source.reproached:
        row |= {"label": None, "response": "Zorbing is wrong."}
    if source.field:
        row[source.field] = source.value
    return row


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows: dict[str, list[dict[str, object]]] = {}
    for source in ALL:
        rows.setdefault(source.file, []).extend(invented_row(source, n, rng) for n in range(24))
    for file, lines in rows.items():
        with gzip.open(folder / f"{file}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
    return folder
