"""Prompts for the lab model's bundle, one folder a role, out of the split in `models.recipe.sources`.

The folders are `fit/`, `threshold/` and `evaluate/`, each with one JSON-lines file a source, for
`neuronguard fit`; `models.recipe.bundle` writes them and goes on from there.
Fitting takes trained and dev sources, and some of their rows once more in other words. Thresholds are set on
benign sources that the probe never sees; some of their rows were seen by the *model*, so that they are no
evaluation sources. Test sources only evaluate.
Licences of what is fitted on are those of `sources`: all permissive.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from models.recipe.corpus import Overlap, Prompt, digest, read, reserved, split_of
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
)
from models.recipe.wording import FIT, changed

THRESHOLD_FILES = {
    "hh_helpful_test": 1100,
    "llms_from_scratch_1k": 1100,
    "awesome_prompts": 1100,
    "safe_unlearning": 1100,
    "cyberseceval": 1100,
    "banking77": 600,
}
"""Benign sources that are kept from the probe as a whole, and how many rows of each are taken at most: open
requests as a general assistant gets them, role-play, narrow questions to a service, and security questions,
which look worse than they are. Without a hard source a threshold is too low, and the rate it promises does
not hold on the next one. Together more than the 3,000 prompts that a rate of 0.1 % needs."""

FIT_CAP = {"harmful": 800, "benign": 1200}
"""Most rows of one source to fit on, by label. Rows that the *model* was not trained on come first: on those
it behaves as it will behave in use."""


REWORDED = {0: "one sentence appended", 1: "three sentences appended", 2: "words before it"}
"""Which change a row to fit on gets a second time with, by the hash of its text modulo ``OUT_OF``."""
OUT_OF = 8


def fit_rows(data: Path, barred: Overlap) -> dict[str, list[Prompt]]:
    """Harmful and benign prompts to fit on, by source."""
    rows: dict[str, list[Prompt]] = {}
    for source in TRAIN_HARMFUL + TRAIN_BENIGN:
        if source.file not in THRESHOLD_FILES:
            found = few(read(data, source))
            found.sort(key=lambda p: split_of(p.text) == "train")
            rows.setdefault(source.file, []).extend(found[: FIT_CAP[source.label]])
    for source in DEV_HARMFUL + DEV_BENIGN:
        # Intents that were kept from the model's training count as unseen rows of their file.
        if source.file not in THRESHOLD_FILES:
            rows.setdefault(source.file, []).extend(read(data, source))
    return {name: [p for p in prompts if p.text not in barred] for name, prompts in rows.items()}


def threshold_rows(data: Path, barred: Overlap) -> dict[str, list[Prompt]]:
    """Benign prompts to set thresholds on, by source."""
    rows: dict[str, list[Prompt]] = {}
    for source in DEV_BENIGN + TRAIN_BENIGN:
        if source.file in THRESHOLD_FILES:
            rows.setdefault(source.file, []).extend(few(read(data, source), THRESHOLD_FILES[source.file]))
    return {name: [p for p in prompts if p.text not in barred] for name, prompts in rows.items()}


def evaluate_rows(data: Path) -> dict[str, list[Prompt]]:
    """Prompts of the test sources."""
    rows: dict[str, list[Prompt]] = {}
    for source in TEST_HARMFUL + TEST_BENIGN:
        rows.setdefault(source.file, []).extend(read(data, source))
    return rows


def reworded(prompts: Iterable[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Some of the prompts, each with itself in other words, harmful and benign ones alike."""
    pairs = []
    for prompt in prompts:
        change = REWORDED.get(digest("reworded:" + prompt.text) % OUT_OF)
        if change is not None:
            pairs.append((prompt, prompt._replace(text=changed(FIT, change, prompt.text))))
    return pairs


def few(prompts: Iterable[Prompt], most: int | None = None) -> list[Prompt]:
    """At most so many, in the order of a hash of their text."""
    return sorted(prompts, key=lambda p: digest("bundle:" + p.text))[:most]


def write(folder: Path, rows: dict[str, list[Prompt]], *, rewordings: bool = False) -> None:
    """One file a source; the source's name is the file's, so that its parts count as one.

    With ``rewordings`` some rows are there twice, the second time in other words; both then carry the first
    one's text as their ``pair``, by which leaving out and intervals know them for one request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in rows.items():
        again = {first.text: second.text for first, second in reworded(prompts)} if rewordings else {}
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for prompt in prompts:
                row = {"prompt": prompt.text, "label": prompt.label, "source": name}
                if second := again.get(prompt.text):
                    row["pair"] = prompt.text
                    file.write(json.dumps({**row, "prompt": second}) + "\n")
                file.write(json.dumps(row) + "\n")


def write_all(data: Path, out: Path) -> None:
    """Write the three folders, in place of what was there."""
    barred = reserved(data)
    for role, rows in (
        ("fit", fit_rows(data, barred)),
        ("threshold", threshold_rows(data, barred)),
        ("evaluate", evaluate_rows(data)),
    ):
        shutil.rmtree(out / role, ignore_errors=True)
        write(out / role, rows, rewordings=role == "fit")
        print(f"{role}: {sum(map(len, rows.values()))} prompts of {len(rows)} sources", flush=True)
