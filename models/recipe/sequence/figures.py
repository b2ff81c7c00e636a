"""Pictures of the study, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guard.locate.pictures import save

NAMES = {
    "flips": ("sequence-flips.png", "Verdicts lost by harmless words"),
    "needle": ("sequence-needle.png", "A harmful request in benign text, and benign text alone"),
}
"""File and title of each picture."""


def draw(document: Mapping[str, Any], folder: Path) -> None:
    """Write all pictures."""
    changes = {
        change: {name: each["rate"] for name, each in guards.items()}
        for change, guards in document["flips"]["changes"].items()
    }
    texts = {
        title: {name: guard["flagged"]["rate"] for name, guard in each["guards"].items()}
        for title, each in document["needle"]["texts"].items()
    }
    save(bars(changes, "share of flagged requests that is lost"), folder / NAMES["flips"][0])
    save(bars(texts, "share that is flagged at the 1 % threshold"), folder / NAMES["needle"][0])


def bars(rows: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """A group of bars a row, one for each guard."""
    names = list(next(iter(rows.values())))
    figure = Figure(figsize=(9.0, 0.62 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    for step, name in enumerate(names):
        y = np.arange(len(rows)) + 0.16 * (step - (len(names) - 1) / 2)
        axes.barh(y, [each[name] for each in rows.values()], height=0.15, label=name)
    axes.set_yticks(np.arange(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=label, xlim=(0, 1))
    axes.legend(fontsize=8)
    return figure
