"""Pictures of the study, drawn out of its figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guard.locate.pictures import save

SAFETY = ("patch-{pair}.png", "Unsafe answers and refused benign requests by share of patched neurons")
Figures = Mapping[str, Any]


def draw(document: Figures, folder: Path) -> None:
    """Write all pictures."""
    for name, pair in document["pairs"].items():
        save(curves(pair), folder / SAFETY[0].format(pair=name))


def curves(pair: Figures) -> Figure:
    """Left: harmful requests answered, with controls. Right: benign requests refused."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, rows) in enumerate(pair["dynamic"].items()):
        _line(left, rows, "unsafe", f"donor's activations, {name}", f"C{colour}")
    _line(left, pair["stored"]["curve"], "unsafe", f"stored: {pair['stored']['way'][0]}", "C3")
    for each in next(iter(pair["dynamic"].values())):
        for name, control in each.get("controls", {"each": {}})["each"].items():
            mark = "x" if name == "window" else "."
            left.plot(100 * each["share"], 100 * control["unsafe"]["rate"], mark, color="0.5")
    left.plot([], [], ".", color="0.5", label="random, same layers")
    left.plot([], [], "x", color="0.5", label="next window")
    best = next(iter(pair["dynamic"].values()))
    for place, role in enumerate(("benign", "hard")):
        found = [row["benign"][role] for row in best]
        shares = [100 * row["share"] for row in best]
        right.errorbar(
            shares, [100 * f["rate"] for f in found], _spans(found), marker="o", capsize=2,
            color=f"C{place}", label={"benign": "benign", "hard": "in harmful words"}[role],
        )  # fmt: skip
        right.axhline(100 * pair["ends"]["donor"]["benign"][role]["rate"], color=f"C{place}", ls="--", lw=0.8)
    left.axhline(100 * pair["ends"]["donor"]["unsafe"]["rate"], color="0.3", ls="--", lw=0.8)
    for axes, title in ((left, "harmful requests answered, %"), (right, "benign requests refused, %")):
        axes.set(xscale="log", xlabel="neurons patched, %", title=title, ylim=(-3, 103))
        axes.set_xticks(_ticks(best), [f"{tick:g}" for tick in _ticks(best)])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    return figure


def _ticks(rows: list[Figures]) -> list[float]:
    return [100 * row["share"] for row in rows]


def _line(axes: Axes, rows: list[Figures], key: str, label: str, colour: str) -> None:
    found = [row[key] for row in rows]
    axes.errorbar(
        _ticks(rows),
        [100 * f["rate"] for f in found],
        _spans(found),
        marker="o",
        capsize=2,
        color=colour,
        label=label,
    )


def _spans(found: list[Figures]) -> Any:
    """Distances to both ends of the intervals, per cent."""
    return 100 * np.array(
        [[f["rate"] - f["low"] for f in found], [f["high"] - f["rate"] for f in found]]
    ).clip(min=0)
