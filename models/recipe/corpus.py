"""Reading the data folder: normalisation, duplicates, and the split into train, dev and held-out rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.recipe.sources import DEV_INTENTS, TEST_BENIGN, TEST_HARMFUL, Label, Source

Split = Literal["train", "dev", "test"]

REPROACH = re.compile(
    r"\b(?:sorry|can't|cannot|illegal|not (?:okay|ok|right|a good idea|appropriate|something)|wrong|harm|"
    r"hurt|dangerous|shouldn't|don't think|please don't|uncomfortable|offensive|racist|crime|not comfortable|"
    r"against)\b",
    re.I,
)
"""Words with which a recorded answer declines or reproaches."""

HELD_OUT_PERCENT = 5
"""Per cent of a trained source's rows that serve as dev rows, and as many again as unseen test rows."""


class Prompt(NamedTuple):
    """One request of a source."""

    text: str
    answer: str | None
    """The source's own answer, only ever used for benign prompts."""
    label: Label
    source: str


def normal(text: str) -> str:
    """Lower-case letters and digits, single spaces: the form in which duplicates are found."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def digest(text: str) -> int:
    """A stable 64-bit number for a text; `hash` would change from process to process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(text: str) -> Split:
    """Split of a row of a trained source: depends on its normalised text alone."""
    bucket = digest("split:" + normal(text)) % 100
    if bucket < HELD_OUT_PERCENT:
        return "test"
    return "dev" if bucket < 2 * HELD_OUT_PERCENT else "train"


def first_turn(row: dict[str, Any]) -> tuple[str, str | None]:
    """First user turn and its answer. Later turns of a dialogue make no sense on their own."""
    messages = row.get("messages")
    if not messages:
        return row["prompt"], row.get("response")
    text = next((m["content"] for m in messages if m["role"] == "user"), row["prompt"])
    answer = next((m["content"] for m in messages if m["role"] == "assistant"), row.get("response"))
    return text, answer


def read(data: Path, source: Source) -> list[Prompt]:
    """All prompts of a source, without duplicates, capped, in a stable order."""
    path = data / f"{source.file}.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file {path.name} in the data folder; see models/lab/README.md for the list"
        )
    found: dict[str, Prompt] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if not source.accepts(row):
                continue
            if source.file == "clinc150" and not source.field and row.get("category") in DEV_INTENTS:
                continue
            text, answer = first_turn(row)
            if source.reproached and not REPROACH.search(answer or ""):
                continue
            answer = answer if source.label == "benign" else None
            found.setdefault(normal(text), Prompt(" ".join(text.split()), answer, source.label, source.name))
    kept = sorted(found.values(), key=lambda p: digest("cap:" + p.text))[: source.cap]
    return [p for p in kept if len(normal(p.text)) >= 3]


class Overlap:
    """Finds prompts that equal, or nearly equal, one of a set of reserved prompts."""

    def __init__(self, texts: Iterable[str], ratio: float = 0.7) -> None:
        self.ratio = ratio
        self.exact: set[str] = set()
        self.bags: list[frozenset[str]] = []
        self.by_word: dict[str, list[int]] = {}
        for text in texts:
            plain = normal(text)
            if plain in self.exact:
                continue
            self.exact.add(plain)
            bag = frozenset(plain.split())
            for word in bag:
                self.by_word.setdefault(word, []).append(len(self.bags))
            self.bags.append(bag)

    def __contains__(self, text: str) -> bool:
        """Same normalised text, or word sets with a Jaccard overlap of `ratio` or more."""
        plain = normal(text)
        if plain in self.exact:
            return True
        bag = frozenset(plain.split())
        # A near-duplicate shares one of the prompt's rarer words; common ones would make this quadratic.
        rare = sorted(bag, key=lambda w: len(self.by_word.get(w, ())))[: max(1, len(bag) // 2)]
        for index in {i for word in rare for i in self.by_word.get(word, ())}:
            other = self.bags[index]
            if len(bag & other) >= self.ratio * len(bag | other):
                return True
        return False


def reserved(data: Path) -> Overlap:
    """Prompts of all test sources, which training prompts must not resemble.

    Sources that are not gated are word swaps of harmful requests: barring what resembles them would bar the
    requests they were made from. They are barred by equality only.
    """
    sources = TEST_HARMFUL + TEST_BENIGN
    overlap = Overlap(p.text for source in sources if source.gated for p in read(data, source))
    overlap.exact.update(normal(p.text) for source in sources if not source.gated for p in read(data, source))
    return overlap


def trained(data: Path, sources: tuple[Source, ...], split: Split, barred: Overlap) -> list[Prompt]:
    """Rows of trained sources that fall into a split and do not resemble a barred prompt."""
    return [p for s in sources for p in read(data, s) if split_of(p.text) == split and p.text not in barred]
