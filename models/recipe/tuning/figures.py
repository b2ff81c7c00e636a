"""The study's picture, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guard.locate.pictures import save

PICTURE = ("tune.png", "Unsafe answers and refused benign requests of each tuned model")
Figures = Mapping[str, Any]


def draw(document: Figures, folder: Path) -> None:
    """Write it."""
    save(picture(document), folder / PICTURE[0])


def picture(document: Figures) -> Figure:
    """One panel a starting model, one row a cell; random units are dots on the row of their set."""
    models = document["models"]
    starts = [name for name, model in models.items() if "cell" not in model]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, start in zip(panels, starts, strict=True):
        rows = [start] + [
            name
            for name, model in models.items()
            if model.get("cell", {}).get("start") == start and model["cell"]["seed"] is None
        ]
        _panel(axes, models, rows)
        axes.set_title(f"from {start}")
    panels[1].legend(fontsize=7, loc="lower right")
    return figure


def _panel(axes: Axes, models: Figures, rows: list[str]) -> None:
    places = np.arange(len(rows))[::-1]
    for number, (key, label) in enumerate((("unsafe", "harmful answered"), ("benign", "benign refused"))):
        found = [models[name][key] if key == "unsafe" else models[name]["refused"][key] for name in rows]
        middle = np.array([each["rate"] for each in found])
        spans = np.array([middle - [e["low"] for e in found], [e["high"] for e in found] - middle])
        axes.errorbar(
            100 * middle,
            places,
            xerr=100 * spans.clip(min=0),
            fmt="o",
            capsize=2,
            color=f"C{number}",
            label=label,
        )
    first = True
    for place, name in zip(places, rows, strict=True):
        for other, model in models.items():
            if other.startswith(f"{name} random "):
                once = "harmful answered, random units" if first else None
                axes.plot(100 * model["unsafe"]["rate"], place - 0.25, ".", color="0.5", label=once)
                first = False
    axes.set_yticks(places, rows)
    axes.set(xlim=(-3, 103), xlabel="%")
