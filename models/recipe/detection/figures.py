"""Pictures of the study, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guard.locate.pictures import save
from models.recipe.detection.left_out import SCORERS

NAMES = {
    "left_out": ("detection-left-out.png", "AUROC of every harmful source when it is left out"),
    "selection": ("detection-selection.png", "Chosen against random neurons, by how many there are"),
    "flips": ("detection-flips.png", "Verdicts lost by rewording"),
}
"""File and title of each picture."""


def draw(document: Mapping[str, Any], folder: Path) -> None:
    """Write all pictures."""
    for name, draw_one in (("left_out", left_out), ("selection", selection), ("flips", flips)):
        save(draw_one(document[name]), folder / NAMES[name][0])


def left_out(sources: Mapping[str, Any]) -> Figure:
    """A row a source, the guard beside the words; sources that the model never saw first."""
    order = sorted(
        sources, key=lambda n: (not sources[n]["unseen_by_the_model"], sources[n][SCORERS[0]]["auroc"])
    )
    figure = Figure(figsize=(9.0, 0.3 * len(order) + 1.2), layout="constrained")
    axes = figure.subplots()
    for step, (scorer, colour) in enumerate(zip(SCORERS, ("C0", "0.45", "0.7"), strict=True)):
        values = [sources[name][scorer] for name in order]
        x = np.array([each["auroc"] for each in values])
        ends = np.array([each["auroc_interval"] for each in values]).T
        error = np.maximum(0, np.stack([x - ends[0], ends[1] - x]))
        axes.errorbar(
            x,
            np.arange(len(order)) + 0.22 * (step - 1),
            xerr=error,
            fmt="o",
            ms=4,
            color=colour,
            label=scorer,
        )
    unseen = sum(entry["unseen_by_the_model"] for entry in sources.values())
    axes.axhline(unseen - 0.5, color="0.3", lw=0.8, ls=":")
    axes.set_yticks(np.arange(len(order)), order)
    axes.invert_yaxis()
    axes.set(xlabel="AUROC against the benign pool (dotted: below it, the model was trained on the source)")
    axes.legend(fontsize=8)
    return figure


def _auroc(entry: Mapping[str, Any]) -> float:
    return float(entry["auroc"])


def _recall(entry: Mapping[str, Any]) -> float:
    return float(entry["tpr_at_fpr"]["0.01"])


def selection(rows: Mapping[str, Any]) -> Figure:
    """AUROC and recall at 1 % over the number of neurons."""
    counted = {name: row for name, row in rows.items() if name.split()[0].isdigit()}
    sizes = [row["n"] for row in counted.values()]
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, (title, value) in zip(
        figure.subplots(1, 2), (("AUROC", _auroc), ("recall at 1 % false positives", _recall)), strict=True
    ):
        axes.plot(sizes, [value(row["chosen"]) for row in counted.values()], "o-", label="chosen (L1)")
        drawn = np.array([[value(each) for each in row["random"]] for row in counted.values()])
        axes.plot(sizes, drawn.mean(1), "s--", color="0.5", label="random, same layers")
        axes.fill_between(sizes, drawn.min(1), drawn.max(1), color="0.85")
        axes.axhline(value(rows["all neurons"]["chosen"]), color="0.3", lw=0.8, ls=":", label="all neurons")
        axes.set(xscale="log", xlabel="neurons", title=title)
        axes.legend(fontsize=8)
    return figure


def flips(document: Mapping[str, Any]) -> Figure:
    """Bars of the share of flagged requests that are no longer flagged, by change and scorer."""
    changes = document["changes"]
    scorers = list(document["flagged"])
    figure = Figure(figsize=(9.0, 0.55 * len(changes) + 1.0), layout="constrained")
    axes = figure.subplots()
    for step, scorer in enumerate(scorers):
        y = np.arange(len(changes)) + 0.2 * (step - (len(scorers) - 1) / 2)
        shares = [each[scorer]["rate"] for each in changes.values()]
        axes.barh(y, shares, height=0.18, label=scorer)
    axes.axvline(0.05, color="0.3", lw=0.8, ls=":")
    axes.set_yticks(np.arange(len(changes)), list(changes))
    axes.invert_yaxis()
    axes.set(xlabel="share of flagged requests that is lost (dotted: the target, 5 %)", xlim=(0, 1))
    axes.legend(fontsize=8)
    return figure
