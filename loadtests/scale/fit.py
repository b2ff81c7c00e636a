"""Times of ``docs/results/grid.json`` as a formula: what the guard adds to a prefill step on a CPU.

The grid has ratios of guarded over plain CPU time; times the plain seconds of the same batches they are
seconds. To these a sum is fitted of a fixed time, a time for each layer read, for each prompt and for each
value read; none may be negative. A cell weighs by the width of its interval.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from loadtests.grid import MODELS

TERMS = ("a step", "a layer read", "a prompt", "1,000 values read")


class Cell(NamedTuple):
    """One cell of the grid: microseconds that the guard adds to a prefill step."""

    model: str
    units: int
    batch: int
    measured: float
    low: float
    high: float
    control: float
    """What plain vLLM over plain vLLM makes of no difference."""

    @property
    def work(self) -> tuple[float, ...]:
        """How often each of ``TERMS`` occurs."""
        layers = MODELS[self.model]["num_hidden_layers"]
        return 1.0, float(layers), float(self.batch), self.batch * self.units / 1000


class Fit(NamedTuple):
    """Microseconds for each of ``TERMS``, and for each cell what they sum up to."""

    coefficients: tuple[float, ...]
    cells: tuple[Cell, ...]
    fitted: tuple[float, ...]

    @property
    def within(self) -> int:
        """Cells whose interval holds what was fitted."""
        return sum(c.low <= value <= c.high for c, value in zip(self.cells, self.fitted, strict=True))


def cells(grid: dict[str, Any], plain: dict[str, dict[str, float]]) -> list[Cell]:
    """The prefill cells of a grid; ``plain`` are CPU seconds of a batch by model and batch size."""
    found = []
    for model, part in grid.items():
        for units, sizes in part["cells"].items():
            for batch, figures in sizes.items():
                scale = 1e6 * plain[model][batch]
                ratio, control = figures["prefill"], figures["prefill_control"]
                measured, low, high = (scale * (ratio[name] - 1) for name in ("median", "low", "high"))
                noise = scale * abs(control["median"] - 1)
                found.append(Cell(model, int(units), int(batch), measured, low, high, noise))
    return found


def fit(measured: list[Cell]) -> Fit:
    """Least squares, not negative, weighted by the widths of the intervals."""
    work = np.array([cell.work for cell in measured])
    weight = np.array([1 / (cell.high - cell.low) for cell in measured])
    values = np.array([cell.measured for cell in measured])
    found, _ = nnls(work * weight[:, None], values * weight)
    return Fit(tuple(map(float, found)), tuple(measured), tuple(map(float, work @ found)))
