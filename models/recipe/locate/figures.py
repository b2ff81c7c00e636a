"""Pictures of the study, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guard.locate.pictures import save

NAMES = {
    "layers": ("locate-{pair}-layers.png", "Selected units by layer"),
    "effects": ("locate-{pair}-effects.png", "Causal effects with their intervals"),
}
"""File and title of each picture of a pair."""


def draw(document: Mapping[str, Any], folder: Path) -> None:
    """Write all pictures."""
    for name, pair in document["pairs"].items():
        for which, figure in (("layers", layers(pair)), ("effects", effects(pair))):
            save(figure, folder / NAMES[which][0].format(pair=name))


def layers(pair: Mapping[str, Any]) -> Figure:
    """Share of each layer in what a method selects: a panel a method, a bar colour a component."""
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    panels = figure.subplots(1, len(pair["methods"]), sharey=True)
    for axes, (name, found) in zip(panels, pair["methods"].items(), strict=True):
        bottom = np.zeros(len(next(iter(found["layers"].values()))))
        for component, counts in found["layers"].items():
            if sum(counts):
                share = np.array(counts) / found["selected"]
                axes.bar(np.arange(len(share)), share, bottom=bottom, label=component)
                bottom += share
        axes.set(title=f"{name} ({found['selected']} units)", xlabel="layer")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("share of the selection")
    return figure


def effects(pair: Mapping[str, Any]) -> Figure:
    """Causal effect C of every checked set, with its interval, beside its controls."""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    panels = figure.subplots(1, len(pair["causal"]))
    titles = {"patched": "patched into the unaligned twin", "removed": "taken out of the aligned twin"}
    for axes, (kind, checks) in zip(panels, pair["causal"].items(), strict=True):
        for place, found in enumerate(checks.values()):
            for step, (which, colour) in enumerate((("selected", "C0"), ("random", "0.5"))):
                each, y = found["effects"][which], place + 0.22 * step
                ends = [[each["value"] - each["low"]], [each["high"] - each["value"]]]
                label = (
                    {"selected": "selected", "random": "random, same layers"}[which] if not place else None
                )
                axes.errorbar(each["value"], y, xerr=ends, fmt="o", color=colour, capsize=3, label=label)
            for each in [e for n, e in found["effects"].items() if n.startswith("window")]:
                label = None if axes.get_legend_handles_labels()[1][2:] else "next windows"
                axes.plot(each["value"], place + 0.44, "x", color="C1", label=label)
        axes.set_yticks(np.arange(len(checks)) + 0.2, list(checks))
        axes.invert_yaxis()
        axes.axvline(0, color="0.8", zorder=0)
        axes.axvline(1, color="0.8", zorder=0)
        axes.set(title=titles[kind], xlabel="causal effect C")
        axes.legend(fontsize=7)
    return figure
