"""The picture of the report, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guard.locate.pictures import save
from loadtests.redteam.report import PICTURE, families

BARS = (
    ("shipped", "shipped guard", "C3"),
    ("transferred", "refitted, the same texts", "0.7"),
    ("refitted", "refitted, attacked anew", "C0"),
)


def draw(document: Mapping[str, Any], folder: Path) -> Path:
    """Write the picture."""
    return save(bars(document["attacks"]), folder / PICTURE)


def bars(attacks: Mapping[str, Any]) -> Figure:
    """Three bars an attack: the share of flagged requests that get past."""
    rows = families(attacks)
    figure = Figure(figsize=(9.0, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for step, (which, label, colour) in enumerate(BARS):
        rates = [entry[which]["passed"] for _, entry in rows]
        x = np.array([rate["rate"] for rate in rates])
        error = np.array([[r["rate"] - r["low"] for r in rates], [r["high"] - r["rate"] for r in rates]])
        axes.barh(
            np.arange(len(rows)) + 0.27 * (step - 1),
            x,
            0.25,
            xerr=np.maximum(0, error),
            color=colour,
            error_kw={"lw": 0.7},
            label=label,
        )
    axes.set_yticks(np.arange(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 1),
        xlabel="share of flagged requests that get past, at the threshold for 1 % false positives",
    )
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3)
    return figure
