"""Pictures of a dashboard without Grafana: its queries, sent to a live Prometheus, drawn with matplotlib.

    python -m deploy.dashboards.render --prometheus http://127.0.0.1:9090 --out guard-overview.png

Shown are stat, timeseries, heatmap and state-timeline panels, at the places that the dashboard gives them.
Tables and folded rows are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from deploy.dashboards.live import Line, LiveError, Window, last_minutes, lines, per_bucket
from deploy.dashboards.look import (
    BORDER,
    FAINT,
    GRID,
    PAGE,
    PANEL,
    TEXT,
    overrides,
    quantity,
    series_colours,
    value_text,
)

FOLDER = Path(__file__).parent.parent / "grafana" / "dashboards"
CAPTION = (
    "Rendered with matplotlib from the queries of deploy/grafana/dashboards/{file} "
    "against a live Prometheus; not a Grafana screenshot."
)
DPI = 200
# In inches: 1800 pixels wide, shown at half that.
_WIDTH, _MARGIN, _GAP = 9.0, 0.06, 0.035
_ROW, _HEAD, _FOOT = 0.205, 0.34, 0.26
_COLUMN = (_WIDTH - 2 * _MARGIN) / 24
_HEAT = LinearSegmentedColormap.from_list("heat", [PANEL, "#7a3a0c", "#ff780a", "#ffe0b8"])


class Place(NamedTuple):
    """A panel, or the title of a row, at its place in Grafana's units from the top."""

    panel: dict[str, Any]
    top: int


def places(board: dict[str, Any], rows: int | None = None) -> tuple[list[Place], int]:
    """What is drawn of the first ``rows`` rows (all by default) and its height, without gaps for what is not.

    Panels that begin at one height form a line, which is dropped if nothing in it can be drawn.
    """
    by_line: dict[int, list[dict[str, Any]]] = {}
    count = 0
    for panel in board["panels"]:
        if panel["type"] == "row":
            if panel.get("collapsed"):
                continue
            count += 1
            if rows is not None and count > rows:
                break
        if panel["type"] in _DRAW:
            by_line.setdefault(panel["gridPos"]["y"], []).append(panel)
    placed: list[Place] = []
    top = 0
    for _, line in sorted(by_line.items()):
        placed += [Place(panel, top) for panel in line]
        top += max(panel["gridPos"]["h"] for panel in line)
    return placed, top


def picture(
    board: dict[str, Any], file: str, client: httpx.Client, window: Window, rows: int | None = None
) -> Figure:
    """The figure. Raises LiveError naming a panel that has no data."""
    placed, height = places(board, rows)
    data = [lines(client, panel, window) if panel["type"] != "row" else [] for panel, _ in placed]
    tall = _HEAD + _ROW * height + _FOOT
    with mpl.rc_context({"font.size": 7, "text.color": TEXT, "axes.edgecolor": GRID}):
        figure = Figure(figsize=(_WIDTH, tall), dpi=DPI, facecolor=PAGE)
        when = datetime.fromtimestamp(window.end, UTC)
        _write(figure, _MARGIN + 0.04, 0.21, board["title"], size=11, weight="bold")
        about = f"last {window.length / 60:.0f} minutes to {when:%Y-%m-%d %H:%M} UTC"
        _write(figure, _WIDTH - _MARGIN, 0.21, about, size=7, color=FAINT, ha="right")
        caption = CAPTION.format(file=file)
        _write(figure, _MARGIN + 0.04, tall - 0.09, caption, size=7, color=FAINT, style="italic")
        for (panel, top), series in zip(placed, data, strict=True):
            spot = panel["gridPos"]
            box = _Box(
                _MARGIN + _COLUMN * spot["x"] + _GAP / 2,
                _HEAD + _ROW * top + _GAP / 2,
                _COLUMN * spot["w"] - _GAP,
                _ROW * spot["h"] - _GAP,
            )
            if panel["type"] == "row":
                _write(figure, box.x + 0.03, box.y + 0.13, f"⌄  {panel['title']}", size=7.5, weight="bold")
                continue
            _frame(figure, box, panel["title"])
            _DRAW[panel["type"]](figure, box, panel, series, window)
    return figure


class _Box(NamedTuple):
    """A rectangle in inches from the upper left corner of the figure."""

    x: float
    y: float
    w: float
    h: float

    def inner(self, left: float, top: float, right: float, bottom: float) -> _Box:
        return _Box(self.x + left, self.y + top, self.w - left - right, self.h - top - bottom)


def _place(figure: Figure, box: _Box) -> tuple[float, float, float, float]:
    width, height = figure.get_size_inches()
    return box.x / width, 1 - (box.y + box.h) / height, box.w / width, box.h / height


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, **style)


def _frame(figure: Figure, box: _Box, title: str) -> None:
    x, y, w, h = _place(figure, box)
    frame = Rectangle((x, y), w, h, facecolor=PANEL, edgecolor=BORDER, linewidth=0.5, zorder=-1)
    frame.set_transform(figure.transFigure)
    figure.add_artist(frame)
    size = min(7.5, 115 * (box.w - 0.1) / len(title))
    _write(figure, box.x + 0.06, box.y + 0.14, title, size=size, weight="bold")


def _axes(figure: Figure, box: _Box, window: Window) -> Axes:
    axes = figure.add_axes(_place(figure, box), facecolor="none")
    axes.tick_params(colors=FAINT, length=0, labelsize=6.8, pad=2)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(window.times[0], window.end)
    room = max(1.0, box.w / 0.6)  # labels that fit
    step = max(60.0, round(window.length / min(room, 6) / 60) * 60)
    first = -(-(window.times[0] + 0.05 * window.length) // step) * step  # clear of the other axis' labels
    axes.set_xticks(np.arange(first, window.end, step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{datetime.fromtimestamp(t, UTC):%H:%M}"))
    return axes


def _lines(figure: Figure, box: _Box, panel: dict[str, Any], series: list[Line], window: Window) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit, custom = defaults["unit"], defaults.get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    beside = panel["options"]["legend"]["placement"] == "right"
    columns, rows = (1, int((box.h - 0.4) / 0.13)) if beside else _legend_shape(series, box)
    side, below = (2.0, 0.26) if beside else (0.1, 0.31 + 0.13 * rows)
    inner = box.inner(0.62, 0.26, side, below)
    axes = _axes(figure, inner, window)
    axes.grid(axis="both", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    colours = series_colours(panel, [line.name for line in series])
    base = np.zeros(len(window.times))
    handles = []
    for line, shade in zip(series, colours, strict=True):
        values = np.asarray(line.values)
        special = overrides(panel, line.name)
        dash = "custom.lineStyle" in special
        opacity = special.get("custom.fillOpacity", custom.get("fillOpacity", 0)) / 100
        top = base + np.nan_to_num(values) if stacked else values
        handles += axes.plot(
            line.times, top, color=shade, linewidth=1.1, linestyle=(0, (4, 3)) if dash else "-",
            marker=".", markersize=3, markevery=_alone(values),
        )  # fmt: skip
        axes.fill_between(line.times, base if stacked else 0, top, color=shade, alpha=opacity, linewidth=0)
        base = top if stacked else base
    axes.set_ylim(defaults.get("min", 0), _ceiling(axes, defaults))
    axes.yaxis.set_major_locator(MaxNLocator(5 if box.h > 1.3 else 4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(float(value), unit)))
    told = sorted(range(len(series)), key=lambda index: -np.nanmax(series[index].values))[: columns * rows]
    handles = [handles[index] for index in sorted(told)]
    names = [f"{series[index].name}  {quantity(series[index].last, unit)}" for index in sorted(told)]
    if more := len(series) - len(told):
        names[-1] += f"   and {more} more"
    where = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.03)} if beside else _under(inner)
    axes.legend(
        handles, names, ncols=columns, frameon=False, fontsize=7, labelcolor=TEXT, handlelength=1.4,
        handletextpad=0.5, columnspacing=1.4, labelspacing=0.35, borderaxespad=0.0, **where,
    )  # fmt: skip


def _legend_shape(series: list[Line], box: _Box) -> tuple[int, int]:
    """Columns and rows of a legend below a panel; no more rows than leave room for the panel."""
    longest = max(len(line.name) for line in series) + 9
    columns = max(1, min(len(series), int((box.w - 0.2) / (0.051 * longest + 0.34))))
    return columns, min(-(-len(series) // columns), max(1, int((0.55 * box.h - 0.3) / 0.13)))


def _under(inner: _Box) -> dict[str, Any]:
    return {"loc": "upper left", "bbox_to_anchor": (-0.52 / inner.w, -0.22 / inner.h)}


def _alone(values: NDArray[np.float64]) -> list[int]:
    """Where a line has a point without a neighbour, which needs a mark to be seen."""
    known = ~np.isnan(values)
    alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    return [int(index) for index in np.flatnonzero(alone)]


def _ceiling(axes: Axes, defaults: dict[str, Any]) -> float:
    if "max" in defaults:
        return float(defaults["max"])
    highest = axes.dataLim.y1
    return 1.08 * highest if highest > 0 else 1.0


def _stat(figure: Figure, box: _Box, panel: dict[str, Any], series: list[Line], window: Window) -> None:
    mode = panel["options"]["textMode"]
    for index, line in enumerate(series):
        text, shade = value_text(panel, line.last)
        fixed = "color" in overrides(panel, line.name)
        shade = series_colours(panel, [line.name])[0] if fixed else shade
        x = box.x + box.w * (index + 0.5) / len(series)
        if mode == "name":
            text, name = line.name.replace(" ", "\n"), ""
        else:
            name = line.name if mode == "value_and_name" else ""
        size = min(17.0, 78 * box.w / len(series) / max(1, *map(len, text.split("\n"))))
        _write(figure, x, box.y + 0.46, text, size=size, color=shade, ha="center", va="center", weight="bold")
        if name:
            _write(figure, x, box.y + 0.68, name, size=7, color=shade, ha="center", va="center")


def _heatmap(figure: Figure, box: _Box, panel: dict[str, Any], series: list[Line], window: Window) -> None:
    axes = _axes(figure, box.inner(0.62, 0.26, 0.66, 0.26), window)
    buckets = per_bucket(series)
    counts = np.clip(np.asarray([line.values for line in buckets]), 0, None)
    edges = np.append(np.asarray(buckets[0].times) - window.step / 2, window.end + window.step / 2)
    mesh = axes.pcolormesh(
        edges, np.arange(len(buckets) + 1), np.where(counts > 1e-9, counts, np.nan),
        cmap=_HEAT, norm=PowerNorm(0.5, vmin=0), edgecolors=PANEL, linewidth=0.3,
    )  # fmt: skip
    shown = range(0, len(buckets), 2)
    axes.set_yticks([index + 1 for index in shown], [buckets[index].name for index in shown])
    axes.set_ylabel(panel["options"]["yAxis"]["axisLabel"], color=FAINT, fontsize=7, labelpad=1)
    x, y, w, h = axes.get_position().bounds
    scale = figure.colorbar(mesh, cax=figure.add_axes((x + w + 0.008, y, 0.008, h)))
    scale.outline.set_visible(False)
    scale.ax.tick_params(colors=FAINT, length=0, labelsize=6.8, pad=2)
    scale.ax.yaxis.set_major_locator(MaxNLocator(5))
    scale.set_label("requests", color=FAINT, fontsize=7, labelpad=2)


def _states(figure: Figure, box: _Box, panel: dict[str, Any], series: list[Line], window: Window) -> None:
    room = int(box.w / 2 / 0.06)
    names = [line.name if len(line.name) <= room else line.name[: room - 1] + "…" for line in series]
    axes = _axes(figure, box.inner(0.15 + 0.06 * max(map(len, names)), 0.26, 0.1, 0.26), window)
    for index, line in enumerate(series):
        for moment, value in zip(line.times, line.values, strict=True):
            if not np.isnan(value):
                shade = value_text(panel, value)[1]
                axes.barh(-index, window.step, left=moment - window.step, height=0.6, color=shade)
        text = value_text(panel, line.last)[0]
        middle = (window.times[0] + window.end) / 2
        axes.text(middle, -index, text, color="white", ha="center", va="center", fontsize=7, weight="bold")
    axes.set_yticks([-index for index in range(len(series))], names)
    axes.set_ylim(-len(series) + 0.4, 0.6)


def _nothing(figure: Figure, box: _Box, panel: dict[str, Any], series: list[Line], window: Window) -> None:
    """A row's title is all there is to it."""


_DRAW = {
    "row": _nothing,
    "stat": _stat,
    "timeseries": _lines,
    "heatmap": _heatmap,
    "state-timeline": _states,
}


def main(arguments: Sequence[str] | None = None, transport: httpx.BaseTransport | None = None) -> int:
    """The command line; returns the exit status. ``transport`` stands for the network in tests."""
    parser = argparse.ArgumentParser(prog="python -m deploy.dashboards.render", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prometheus", required=True, metavar="URL", help="address of a running Prometheus")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the PNG to write")
    parser.add_argument("--dashboard", default="guard-overview", choices=["guard-overview", "engine"])
    parser.add_argument("--minutes", type=float, default=10.0, help="time to show, up to now")
    parser.add_argument("--rows", type=int, help="draw this many rows of panels and no more")
    given = parser.parse_args(arguments)
    file = f"{given.dashboard}.json"
    board = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    try:
        with httpx.Client(base_url=given.prometheus, timeout=30.0, transport=transport) as client:
            figure = picture(board, file, client, last_minutes(given.minutes), given.rows)
    except LiveError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, facecolor=PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
