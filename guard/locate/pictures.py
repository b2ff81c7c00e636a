"""Pictures of sets of units, drawn with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from guard.cache import write_whole
from guard.locate.compare import Comparison, ranked
from guard.locate.unit_set import Float64Array, UnitSet

_WIDTH = 8.0
"""Of every picture, in inches."""
_COLUMNS = 512
"""Most columns of a heat map; more units than that share columns."""


def save(figure: Figure, path: Path) -> Path:
    """Write a picture as PNG, whole or not at all."""
    # Without the version of matplotlib: the same units give the same file.
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120, metadata={"Software": None}))
    return path


def heat_map(found: UnitSet) -> Figure:
    """Scores by layer and unit, one panel a component; where several units share a column, the highest.

    Colours end at the 1st and the 99.9th percentile, for scores have long tails. Grey: no candidate.
    """
    names = list(found.scores)
    heights = [1.2 + 0.12 * len(found.scores[name]) for name in names]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, height_ratios=heights)[:, 0]
    for name, axes in zip(names, panels, strict=True):
        scores = found.scores[name]
        there = scores[~np.isnan(scores)]
        low, high = np.quantile(there, [0.01, 0.999]) if there.size else (0.0, 1.0)
        axes.set_facecolor("0.8")
        image = axes.imshow(
            pooled(scores, _COLUMNS),
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(-0.5, scores.shape[1] - 0.5, -0.5, len(scores) - 0.5),
            vmin=low,
            vmax=high if high > low else low + 1,
        )
        axes.set(title=f"{name}, {found.provenance.method}", xlabel="unit", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="score")
    return figure


def pooled(scores: Float64Array, columns: int) -> Float64Array:
    """The highest score of neighbouring units, ``[layers, ≤ columns]``; NaN where none is a candidate."""
    edges = np.unique(np.linspace(0, scores.shape[1], columns + 1).astype(int)[:-1])
    highest: Float64Array = np.maximum.reduceat(np.where(np.isnan(scores), -np.inf, scores), edges, axis=1)
    highest[np.isneginf(highest)] = np.nan
    return highest


def layer_histogram(sets: Mapping[str, UnitSet]) -> Figure:
    """Share of each layer in the selected units, by component, sets side by side."""
    figure, axes = _one()
    bars = [(name, component) for name, found in sets.items() for component in found.selected]
    width = 0.8 / len(bars)
    for place, (name, component) in enumerate(bars):
        counts = sets[name].selected[component].sum(axis=1)
        where = np.arange(len(counts)) + (place - (len(bars) - 1) / 2) * width
        label = component if len(sets) == 1 else f"{name}, {component}"
        axes.bar(where, counts / max(1, len(sets[name])), width, label=label)
    axes.set(xlabel="layer", ylabel="share of the selected units")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def score_decay(sets: Mapping[str, UnitSet]) -> Figure:
    """Scores from the highest down, over the logarithm of the rank; a dot where as many as selected end."""
    figure, axes = _one()
    for name, found in sets.items():
        scores = ranked(found)
        (line,) = axes.plot(np.arange(1, len(scores) + 1), scores, label=name)
        if len(found):
            axes.plot([len(found)], [scores[len(found) - 1]], "o", color=line.get_color())
    axes.set(xscale="log", xlabel="rank", ylabel="score")
    axes.legend()
    return figure


def overlap_matrix(sets: Mapping[str, UnitSet], compared: Mapping[tuple[str, str], Comparison]) -> Figure:
    """Jaccard index of every pair; empty where the sets have no component in common."""
    names = list(sets)
    matrix: NDArray[np.float64] = np.eye(len(names))
    for (first, second), found in compared.items():
        value = found.overlap.jaccard if found.overlap else np.nan
        a, b = names.index(first), names.index(second)
        matrix[a, b] = matrix[b, a] = value
    figure = Figure(figsize=(_WIDTH, _WIDTH * 0.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            colour = "black" if value > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label="Jaccard index of the selected units")
    return figure


def _one() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
    return figure, figure.subplots()
