"""Pictures of an evaluation, as SVG for an HTML page, each with the sentence that stands in for it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from guard.figures import Scored
from guard.ranking import Ranking
from guard.verdict import Threshold

HARMFUL, BENIGN, GREY = "#b3400f", "#1f6fb2", "#666666"
"""Told apart by people who see few colours, and in grey print."""
_WIDTH = 9.0
_BARS = 60
"""Most bars of a chart; the table on the page has all."""
_POINTS = 2000
"""Most points of a curve: more are not seen."""


class Picture(NamedTuple):
    """One picture and what it shows."""

    title: str
    alt: str
    source: str
    """A ``data:`` address."""


def _finish(figure: Figure, title: str, alt: str) -> Picture:
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "neuronguard", "svg.fonttype": "path"}), warnings.catch_warnings():
        # Names of sources are anybody's; a letter that the font lacks is drawn as a box.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(title, alt, "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode())


def _new(columns: int = 1, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def roc(curves: Mapping[str, Scored]) -> Picture | None:
    """True against false positives, plain and with the strict end stretched; None when a class is missing."""
    figure, panels = _new(2)
    told = []
    for name, scored in curves.items():
        if scored.positive.all() or not scored.positive.any():
            continue
        curve = Ranking(scored.scores, scored.positive).curve()
        true = np.concatenate([[0.0], curve.true[0] / curve.true[0, -1]])
        false = np.concatenate([[0.0], curve.false[0] / curve.false[0, -1]])
        kept = _thinned(len(true))
        for axes in panels:
            # What is reached between two scores is not known: the curve goes in steps on the stretched panel.
            axes.plot(
                false[kept], true[kept], label=name, drawstyle="steps-post" if axes is panels[1] else None
            )
        told.append(f"{name}: AUROC {float(curve.auroc()[0]):.3f}, {float(curve.recall(0.01)[0]):.0%} at 1 %")
    if not told:
        return None
    smallest = 1 / max(int((~scored.positive).sum()) for scored in curves.values())
    panels[0].plot([0, 1], [0, 1], color=GREY, linestyle=":")
    panels[1].set(xscale="log", xlim=(min(smallest, 1e-3), 1))
    for axes in panels:
        axes.set(xlabel="share of benign prompts flagged", ylabel="share of harmful prompts flagged")
    panels[0].legend(loc="lower right")
    alt = "Receiver operating characteristic. Harmful prompts flagged at 1 % false positives: " + "; ".join(
        told
    )
    return _finish(figure, "Receiver operating characteristic", alt)


def reliability(calibration: Mapping[str, Any]) -> Picture:
    """Observed rates over stated probabilities, with the intervals of the bins."""
    figure, (axes,) = _new()
    bins = calibration["bins"]
    said = np.array([each["predicted"] for each in bins])
    rate = np.array([each["observed"] for each in bins])
    ends = np.array([each["observed_interval"] for each in bins])
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    axes.errorbar(
        said, rate, yerr=np.abs(ends.T - rate), fmt="o-", color=HARMFUL, capsize=3, label="observed, 95 %"
    )
    axes.set(xlabel="stated probability, at the base rate of these prompts", ylabel="share that is positive")
    axes.legend(loc="upper left")
    alt = (
        f"Reliability in {len(bins)} bins of equal size. Expected calibration error "
        f"{calibration['expected_calibration_error']:.3f}; a calibrated model shows "
        f"{calibration['null']['mean']:.3f} at this number of prompts, at most "
        f"{calibration['null']['p95']:.3f} in 95 of 100 cases."
    )
    return _finish(figure, "Reliability", alt)


def histograms(scored: Scored, thresholds: Sequence[Threshold]) -> Picture:
    """Raw scores of harmful and benign prompts, and where the bundle's thresholds lie."""
    figure, (axes,) = _new()
    edges = np.histogram_bin_edges(scored.scores.astype(np.float64), bins=50)
    for name, colour, rows in (
        ("benign", BENIGN, ~scored.positive),
        ("harmful", HARMFUL, scored.positive),
    ):
        if rows.any():
            heights = np.histogram(scored.scores[rows], edges)[0] / rows.sum()
            axes.stairs(
                heights, edges, color=colour, label=f"{name}, {int(rows.sum())}", fill=True, alpha=0.45
            )
    for threshold in thresholds:
        axes.axvline(threshold.logit, color=GREY, linestyle="--")
        axes.annotate(
            f"{threshold.false_positive_rate:.1%}",
            (threshold.logit, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
        )
    axes.set(xlabel="score (logit of the probe)", ylabel="share of the prompts")
    axes.legend()
    parts = [
        f"median of {name} prompts {float(np.median(scored.scores[rows])):.2f}"
        for name, rows in (("harmful", scored.positive), ("benign", ~scored.positive))
        if rows.any()
    ]
    return _finish(figure, "Scores", "Histogram of scores: " + ", ".join(parts) + ".")


def bars(groups: Mapping[str, Any], rate: str, what: str) -> Picture | None:
    """Share flagged at one of the bundle's thresholds, harmful and benign prompts of each group."""
    rows = [
        (
            name,
            kind,
            entry[f"flag_rate_{kind}_at"][rate],
            entry[f"flag_rate_{kind}_at_interval"][rate],
            colour,
        )
        for name, entry in groups.items()
        for kind, colour in (("harmful", HARMFUL), ("benign", BENIGN))
        if entry[f"flag_rate_{kind}_at"].get(rate) is not None
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: (row[1], row[2]))
    shown = rows[-_BARS:]
    figure, (axes,) = _new(height=1.2 + 0.26 * len(shown))
    places = np.arange(len(shown))
    values = np.array([row[2] for row in shown])
    ends = np.array([row[3] for row in shown])
    axes.barh(
        places, values, xerr=np.abs(ends.T - values), color=[row[4] for row in shown], ecolor=GREY, capsize=2
    )
    labels = axes.set_yticks(places, [f"{_short(name)} ({kind})" for name, kind, *_ in shown])
    for label in [*labels, *axes.get_yticklabels()]:
        if hasattr(label, "set_parse_math"):
            label.set_parse_math(False)
    axes.set(xlabel=f"share flagged at the threshold for {float(rate):.1%}", xlim=(0, 1))
    alt = f"Share flagged by {what}: " + "; ".join(
        f"{_short(name)} ({kind}) {value:.1%}" for name, kind, value, *_ in reversed(shown)
    )
    return _finish(figure, f"Flagged, by {what}", alt)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"


def _thinned(points: int) -> NDArray[np.int64]:
    """Indices of at most so many points, denser at the beginning, where a guard is operated."""
    if points <= _POINTS:
        return np.arange(points)
    spread = np.concatenate(
        [np.geomspace(1, points, _POINTS // 2) - 1, np.linspace(0, points - 1, _POINTS // 2)]
    )
    return np.unique(spread.round().astype(np.int64))
