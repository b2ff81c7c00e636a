"""What the study is about, how large it is, and where its parts are kept.

Every part (a set of units, a causal check, a vector) is stored under a digest of all that it depends on as
soon as it is whole; a second run takes what is there. Parts do not know the code that made them: after a
change of a method, remove the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from guard.cache import digest_of
from guard.checkpoint import Checkpoint
from guard.lab import materialise
from guard.locate.results import versions
from models.recipe.parts import part


class Pair(NamedTuple):
    """An unaligned model and its aligned twin."""

    name: str
    donor: str
    """Variant of the lab directory; the recipient is `lab-sft` in both."""
    about: str


RECIPIENT = "lab-sft"
PAIRS = (
    Pair("planted", "lab-aligned", "co-adapted: the twins differ in 256 planted neurons alone"),
    Pair("dense", "lab-aligned-dense", "plainly trained: an (IA)³ vector on every layer but the last"),
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    locate: int = 200
    """Harmful prompts, and as many benign ones, that units are located with."""
    effect: int = 240
    """Harmful prompts that causal checks are made on."""
    benign: int = 160
    """Benign prompts on which damage is looked for."""
    new_tokens: int = 12
    """Longest answer in causal checks: the lab models refuse with a sentence of eleven tokens."""
    score_tokens: int = 28
    """Longest answer over which change scores are taken."""
    controls: int = 5
    """Random controls of each set."""
    samples: int = 3
    """Draws of prompts from the first pool, the seeds of the study."""
    share: float = 0.05
    """Share of the neurons, all layers but the last, that is patched where methods are held side by side."""
    helpful_steps: int = 80
    """Optimiser steps of the helpful twin."""


@dataclass(frozen=True)
class Study:
    """The lab directory, the data, a folder for parts."""

    data: Path
    lab: Path
    store: Path
    size: Size

    def part(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A JSON document: read back, or computed now and kept."""
        return part(self.store, self.key(key), compute)

    def key(self, key: Any) -> Any:
        """All that a part depends on: besides its own key the models, sizes and versions."""
        weights = {
            name: self.checkpoint(name).weights_sha256 for name in (RECIPIENT, *(p.donor for p in PAIRS))
        }
        return [key, weights, asdict(self.size), versions()]

    def folder(self, kind: str, key: Any) -> Path:
        """Where a part that is no JSON document is kept."""
        return self.store / kind / digest_of(self.key(key))[:24]

    def checkpoint(self, variant: str) -> Checkpoint:
        """A model of the lab directory."""
        if variant not in self._opened:
            path = materialise(self.lab, variant, cache=self.store / "checkpoints")
            self._opened[variant] = Checkpoint.open(path, variant)
        return self._opened[variant]

    @cached_property
    def _opened(self) -> dict[str, Checkpoint]:
        return {}
