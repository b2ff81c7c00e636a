"""What the guard takes and does on one rank, as formulas. ``docs/scaling.md`` explains them.

Exact are memory, the operations of a step and their FLOPs: tests compare them with what the engine allocates
and runs. Bytes moved follow from the shapes, but for the gathered values: on a GPU each of them costs a whole
sector of memory, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SECTOR = 32
"""Bytes that a GPU reads for a value that lies alone (CUDA C++ Best Practices Guide, coalesced access)."""
AFTERWARDS = {"linear": 0, "mlp": 3, "product": 5}
"""Operations of ``guard.engine.head`` after the probe's first layer and its bias, by kind of probe."""


@dataclass(frozen=True)
class Rank:
    """What a bundle asks of one rank."""

    features: int
    """Features that this rank holds: of tensor-parallel ranks, each its share."""
    places: int
    """Layers whose input is read here."""
    requests: int
    """The most prompts that may end in one step: ``--max-num-seqs``."""
    element: int
    """Bytes of the model's dtype."""
    probe: str = "linear"
    outputs: int = 1
    """Of the probe's first layer: 1, 2 for a product, the width of the hidden layer."""
    on_host: bool = False

    @property
    def memory(self) -> int:
        """Bytes beside the model and its cache (``guard.engine.taps.Taps.bytes``)."""
        index = 8 * self.requests * self.features
        features = self.element * self.requests * self.features
        columns_and_widths = 2 * 8 * self.features
        weights = 4 * self.outputs * (self.features + 1 + (self.probe == "mlp"))
        converted = 0 if self.element == 4 else 4 * self.requests * self.features
        results = 4 * self.requests * (self.outputs + 1)
        rows = 0 if self.on_host else 8 * self.requests
        return index + features + columns_and_widths + weights + converted + results + rows


def patch_memory(columns: Sequence[int], patches: int, tokens: int, element: int) -> int:
    """Bytes of the tables (``guard.engine.patches.Patches.bytes``).

    ``columns`` are the patched columns of each place on this rank, ``patches`` those of the bundle, of
    whatever kind, and ``tokens`` the most of a step.
    """
    return sum((8 + 2 * element * (patches + 1)) * count for count in columns) + 8 * tokens


class Step(NamedTuple):
    """What the guard does in one step on one rank."""

    operations: int
    """Kernels and copies that are launched."""
    moved: int
    """Bytes read and written in the device's memory."""
    flops: int
    """Of the probe's first layer; what follows it is smaller by the number of features."""
    reduced: int
    """Bytes that the ranks add up, once a step and only where prompts end."""


def step(rank: Rank, ending: int, tokens: int, *, replayed: bool, ranks: int = 1) -> Step:
    """A step of ``tokens`` tokens in which ``ending`` prompts end.

    Where the forward pass is ``replayed`` (compiled or recorded), the layers are read in every step;
    elsewhere only in steps in which a prompt ends.
    """
    rows = min(rank.requests, tokens) if replayed else ending
    read = rows * rank.features * (8 + SECTOR + rank.element)
    operations = rank.places if rows else 0
    if not ending:
        return Step(operations, read, 0, 0)
    cells, outputs = ending * rank.features, ending * rank.outputs
    staged = 8 * ending + 16 * rank.features + 24 * cells + rank.element * cells
    converted = 0 if rank.element == 4 else (rank.element + 4) * cells
    scored = 4 * cells + 4 * rank.features * rank.outputs + 4 * rank.outputs + 12 * outputs
    reset = 8 * rank.features + 8 * cells if replayed else 0
    operations += 3 + (rank.element != 4) + 2 + AFTERWARDS[rank.probe] + replayed
    operations += 1 if rank.on_host else 2
    return Step(
        operations,
        read + staged + converted + scored + reset + 8 * ending,
        2 * cells * rank.outputs,
        4 * outputs if ranks > 1 else 0,
    )
