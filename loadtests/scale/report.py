"""Table and picture of the layouts."""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.pairs import Interval
from loadtests.scale.load import AT_ONCE, LENGTH
from loadtests.scale.servers import LAYOUTS

Rounds = dict[str, list[dict[str, float]]]
FIGURES = {
    "requests_per_second": ("requests a second", 2, 1.0),
    "output_tokens_per_second": ("output tokens a second", 0, 1.0),
    "prefill_tokens_per_second": ("prefill tokens a second", 0, 1.0),
    "first_token_seconds": ("time to first token under load, ms", 0, 1e3),
    "first_token_alone_seconds": ("time to first token alone, ms", 0, 1e3),
    "cpu_seconds_per_request": ("CPU of all servers by request, ms", 0, 1e3),
}
"""What a round measures: title, decimals, factor to the unit of the title."""


def table(layouts: dict[str, Rounds]) -> str:
    """Markdown: each figure by layout, guard off and on, their ratio, and what the layout brings."""
    names = [name for name in LAYOUTS if name in layouts]
    lines = []
    for figure, (title, digits, factor) in FIGURES.items():
        lines += [
            f"| {title} | guard off | guard on | on / off [95 % interval] | on / on of one engine |",
            "|---|--:|--:|--:|--:|",
        ]
        for name in names:
            rounds = layouts[name]
            off, on = ([row[figure] for row in rounds[way]] for way in ("off", "on"))
            ratio = Interval.of([b / a for a, b in zip(off, on, strict=True)])
            base = [row[figure] for row in layouts["one"]["on"]] if "one" in layouts else on
            cells = [f"{factor * median(values):.{digits}f}" for values in (off, on)]
            gain = f"{median(on) / median(base):.2f}"
            lines.append(f"| {LAYOUTS[name].title} | {cells[0]} | {cells[1]} | {ratio} | {gain} |")
        lines.append("")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    machine, rounds = results["machine"], results["rounds"]
    shortest, longest = LENGTH
    text = f"""`python -m loadtests.scale`: a random 12 × 768 model, float32, 1,200 units, one thread for each
        engine or rank. Plain vLLM (*off*: asked directly, replicas in turn) and guarded vLLM behind a gateway
        (*on*) run side by side and take turns on the same prompts of {shortest} to {longest} tokens, {rounds}
        rounds each, {AT_ONCE} requests at a time; *alone* is one request after another. Medians.
        {results["cores"]} cores, which engines, gateway and client share: two engines can be twice as fast at
        most, and only as far as nothing else wants a core. Python {machine["python"]}, vLLM
        {machine["vllm"]}, commit {machine["commit"]}. Figures: [scale.json](scale.json)."""
    text = textwrap.fill(" ".join(text.split()), 120, break_long_words=False)
    image = "![Requests, prefill and time to first token by layout](../images/scale.png)"
    return f"# Two replicas, two ranks\n\n{text}\n\n{image}\n\n{table(results['layouts'])}"


def picture(layouts: dict[str, Rounds], path: Path) -> None:
    """Requests and prefill tokens a second, and both times to first token, as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = list(FIGURES)[:1] + list(FIGURES)[2:5]
    names = [name for name in LAYOUTS if name in layouts]
    drawn, axes = pyplot.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.4))
    for axis, figure in zip(axes, shown, strict=True):
        title, _, factor = FIGURES[figure]
        for shift, way in ((-0.2, "off"), (0.2, "on")):
            values = [[factor * row[figure] for row in layouts[name][way]] for name in names]
            middle = [median(v) for v in values]
            spans = [
                [m - min(v) for m, v in zip(middle, values, strict=True)],
                [max(v) - m for m, v in zip(middle, values, strict=True)],
            ]
            at = [place + shift for place in range(len(names))]
            axis.bar(at, middle, 0.38, yerr=spans, capsize=2, label=f"guard {way}")
        axis.set_xticks(range(len(names)), [LAYOUTS[n].title for n in names], rotation=20, ha="right")
        axis.tick_params(labelsize=7)
        axis.set_title(title, fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
