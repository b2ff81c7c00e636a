"""A method as ``neuronguard locate`` expects it: options, and a function that turns models into a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate.errors import LocateError
from guard.locate.unit_set import Provenance, UnitSet, top

seen: list[dict[str, Any]] = []
"""What ``run`` was given, call by call."""


@dataclass(frozen=True)
class FakeOptions:
    """Its choices."""

    fraction: float = 0.1
    """Share of the candidates to select,
    by ``score``."""
    count: int | None = None
    """Number of units."""
    parts: tuple[Literal["mlp", "attention"], ...] = ("mlp",)
    """What to score."""
    side: Literal["left", "right"] = "left"
    """Which end."""
    normalise: bool = True
    """Standardise first."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise LocateError(f"fraction is {self.fraction}; expected above 0 and at most 1")


def run(
    checkpoint: Checkpoint,
    donor: Checkpoint,
    datasets: Sequence[Dataset],
    options: FakeOptions,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    cache: Cache | None = None,
    progress: bool = False,
    notes: Path | None = None,
) -> UnitSet:
    """Random scores."""
    seen.append(dict(locals()))
    shape = checkpoint.shape
    random = np.random.default_rng(seed)
    scores = {part: random.random((shape.layers, shape.units(part))) for part in options.parts}
    wanted: dict[str, Any] = (
        {"fraction": options.fraction} if options.count is None else {"count": options.count}
    )
    provenance = Provenance(
        method="contrast",
        options=asdict(options),
        model=checkpoint.card(),
        donor=donor.card(),
        data=tuple(file for dataset in datasets for file in dataset.files),
        template="chat",
        seed=seed,
        versions={},
        cost={"forward_passes": 1.0},
    )
    return UnitSet(provenance, scores, top(scores, **wanted))
