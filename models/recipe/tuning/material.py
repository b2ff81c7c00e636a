"""What the study trains on and with: data files, and sets of units located on the models it starts from.

Training data are of sources that the lab models were trained on, all with permissive licences; figures are of
sources that no model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from guard.cache import digest_of
from guard.checkpoint import Checkpoint
from guard.data import Dataset, load
from guard.lab import materialise
from guard.locate import capacity, controls, importance
from guard.locate.results import versions
from guard.locate.unit_set import UnitSet
from models.recipe.answers import REFUSAL
from models.recipe.bundle_data import write
from models.recipe.corpus import digest
from models.recipe.locate.helpful import answered
from models.recipe.locate.prompts import POOLS, Pool, draw

SFT, ALIGNED = "lab-sft", "lab-aligned-dense"
SAFETY = Pool(
    POOLS["first"].harmful + POOLS["second"].harmful,
    ("hh_helpful_test", "gpteacher", "clinc150", "banking77", "llms_from_scratch_1k", "medquad_5k"),
)
CONSISTENCY = 0.9
"""Share of prompts that a unit must be active for; at 1, the paper's, the lab models have six such units."""
UNITS = {
    "importance": "active for 90 % of the harmful prompts (Zhao et al.)",
    "robust": "the same, without those that as many benign prompts need (Zhao et al.)",
    "scu": "safety-critical (Li & Kim)",
    "ru": "redundant (Li & Kim)",
    "scu+cu": "safety-critical and complex (Li & Kim)",
}


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    locate: int = 120
    """Prompts of each kind that units are located with."""
    safety: int = 480
    """Harmful prompts with the refusal, and as many benign ones with the model's own answers."""
    downstream: int = 960
    """Benign requests with the answers of their sources."""
    steps: int = 60
    """Of 16 rows: all data once."""
    batch: int = 16
    own_tokens: int = 12
    """Tokens of a model's own answer that it is trained on."""
    draws: int = 3
    """Random controls of a set."""
    harmful: int = 210
    """Harmful test prompts."""
    benign: int = 120
    hard: int = 60
    """Benign prompts in the words of harmful ones."""
    texts: int = 100
    """Held-out answers whose likelihood is measured, and as many of the starting model's own."""
    new_tokens: int = 24
    """Longest answer that is judged."""


@dataclass(frozen=True)
class Material:
    """The lab directory, the data, a folder for all that is made."""

    data: Path
    lab: Path
    store: Path
    size: Size

    @cached_property
    def root(self) -> Path:
        """Where everything of this study lies: another size, other weights or versions go elsewhere."""
        weights = [self.start(name).weights_sha256 for name in (SFT, ALIGNED)]
        # More random controls are more cells and change none of the others.
        size = {**self.size.__dict__, "draws": None}
        return self.store / digest_of([weights, size, versions()])[:16]

    def start(self, variant: str) -> Checkpoint:
        """A lab model."""
        return Checkpoint.open(materialise(self.lab, variant), variant)

    def rows(self, name: str) -> Path:
        """The data file `refusals`, `safety` (with benign requests) or `downstream`."""
        path = self.root / "data" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in self._rows(name)), "utf-8")
        return path

    def _rows(self, name: str) -> Iterable[dict[str, Any]]:
        if name == "downstream":
            found = sorted(answered(self.data, held_out=False), key=lambda p: digest(f"tune:{p.text}"))
            for prompt in found[: self.size.downstream]:
                yield {"prompt": prompt.text, "label": "benign", "response": prompt.answer}
            return
        for prompt in draw(self.data, SAFETY, "harmful", self.size.safety, 1):
            yield {"prompt": prompt.text, "label": "harmful", "response": REFUSAL}
        if name == "safety":
            for prompt in draw(self.data, SAFETY, "benign", self.size.safety, 1):
                yield {"prompt": prompt.text, "label": "benign"}

    def units(self, variant: str, kind: str, seed: int | None = None) -> Path:
        """A set of units located on a lab model, or a random control of it."""
        if seed is None:
            return self._kept(f"{variant}-{kind}", lambda: self._locate(variant, kind))
        found = UnitSet.load(self.units(variant, kind))
        # Of most units there is no control that shares none.
        disjoint = kind != "scu+cu"
        return self._kept(
            f"{variant}-{kind}-random-{seed}",
            lambda: controls.random_like(found, seed=seed, disjoint=disjoint),
        )

    def _kept(self, name: str, make: Callable[[], UnitSet]) -> Path:
        path = self.root / "units" / name
        if not path.is_dir():
            print("units:", name, flush=True)
            make().save(path)
        return path

    def _prompts(self) -> Dataset:
        folder = self.root / "located-with"
        rows = [p for label in ("harmful", "benign") for p in draw(self.data, POOLS["first"], label, self.size.locate, 0)]  # fmt: skip  # noqa: E501
        write(folder, {"first": rows})
        return load("fit", [folder])

    def _locate(self, variant: str, kind: str) -> UnitSet:
        checkpoint, data = self.start(variant), self._prompts()
        if kind in ("importance", "robust"):
            options = importance.ImportanceOptions(foundation=kind == "robust", consistency=CONSISTENCY)
            return importance.run(checkpoint, data, options)
        classes = [
            capacity.run(checkpoint, data, capacity.CapacityOptions(select=each, attention_unit="channel"))  # type: ignore[arg-type]
            for each in kind.split("+")
        ]
        first, *others = classes
        selected = dict(first.selected)
        for other in others:
            selected = {name: mask | other.selected[name] for name, mask in selected.items()}
        return replace(first, selected=selected)
