"""What the guard costs by model size, number of units and batch size.

Each model and number of units has a guarded engine of its own, with one thread. Every batch runs in it three
times, the order rotating: guarded, and twice with the guard taken out (``loadtests.switch``). A figure is the
median over batches of guarded over plain process CPU time, and the two plain runs over one another are the
control: what this way of measuring makes of no difference at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from guard.bundle import Site
from loadtests import random_model
from loadtests.batches import batches, with_threshold
from loadtests.pairs import Child, Interval

UNITS = (100, 1000, 5000)
BATCHES = (1, 16, 64)
ENGINE = {"max_model_len": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 64, "block_size": 32}
LENGTH = (16, 48)
NEW_TOKENS = 12
WARM_UP = 3
ROUNDS = (9, 300)
"""Least and most rounds of three runs for one figure of a cell; small batches are quick and noisy."""


def sizes(layers: int, hidden: int, mlp: int) -> dict[str, Any]:
    """A Llama of this size; heads are 64 wide."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    }


MODELS: dict[str, dict[str, Any]] = {
    "4 × 128": sizes(4, 128, 1536),
    "8 × 384": sizes(8, 384, 1536),
    "12 × 768": sizes(12, 768, 2048),
    "12 × 832": sizes(12, 832, 2304),
}
"""Layers × hidden size: 2.6, 19, 85 and 102 million parameters."""


def spread(units: int, layers: int, width: int, seed: int) -> tuple[Site, ...]:
    """Random MLP neurons, as many in each layer as in any other."""
    rng = np.random.default_rng(seed)
    counts = [units // layers + (layer < units % layers) for layer in range(layers)]
    return tuple(
        Site(layer=layer, kind="mlp", units=tuple(sorted(rng.choice(width, count, replace=False).tolist())))
        for layer, count in enumerate(counts)
    )


def measure(name: str, folder: Path, logs: Path, seconds: float) -> dict[str, Any]:
    """All cells of one model: ``{"cells": {units: {batch: figures}}, "bytes": {units: bytes}}``."""
    config = MODELS[name]
    model = random_model.make_model(folder / name, config)
    (fitting,) = batches(1, 24, LENGTH, 256, seed=0)
    found: dict[str, Any] = {"cells": {}, "bytes": {}}
    for units in UNITS:
        click.echo(f"  {name}, {units} units", err=True)
        sites = spread(units, config["num_hidden_layers"], config["intermediate_size"], seed=units)
        bundle = random_model.make_bundle(folder / f"{name}-{units}", model, sites, fitting)
        passing = with_threshold(bundle, folder / f"{name}-{units}-pass", 1.0)
        engine = Child(model, passing, ENGINE, logs / f"grid-{name}-{units}.log")
        try:
            found["bytes"][units] = engine.wait_ready()["guard_bytes"]
            found["cells"][units] = {size: cell(engine, size, seconds) for size in BATCHES}
        finally:
            engine.close()
    return found


def cell(engine: Child, size: int, seconds: float) -> dict[str, Any]:
    """Throughput and prefill of one batch size, each with its control, from about ``seconds`` of CPU each."""
    figures = {}
    for figure, new_tokens, seed in (("throughput", NEW_TOKENS, 10), ("prefill", 1, 20)):
        warm = rotate(engine, batches(WARM_UP, size, LENGTH, 256, seed=seed), new_tokens)
        per_round = sum(map(sum, warm.values())) / WARM_UP
        count = min(max(round(seconds / per_round), ROUNDS[0]), ROUNDS[1])
        timed = rotate(engine, batches(count, size, LENGTH, 256, seed=seed + size), new_tokens)
        guarded, plain = timed["guarded"], timed["plain"]
        figures[figure] = ratio(plain, guarded) if figure == "throughput" else ratio(guarded, plain)
        figures[f"{figure}_control"] = ratio(plain, timed["control"])
    return {figure: interval._asdict() for figure, interval in figures.items()}


def rotate(engine: Child, prompts: list[list[list[int]]], new_tokens: int) -> dict[str, list[float]]:
    """CPU seconds of each batch in each of the three ways; each comes first as often as any other."""
    seconds: dict[str, list[float]] = {"plain": [], "guarded": [], "control": []}
    ways = list(seconds)
    for turn, batch in enumerate(prompts):
        for step in range(len(ways)):
            way = ways[(turn + step) % len(ways)]
            seconds[way].append(engine.run(batch, new_tokens, guard=way == "guarded")["cpu"])
    return seconds


def ratio(above: list[float], below: list[float]) -> Interval:
    """Median of the batches' ratios with its interval."""
    return Interval.of([a / b for a, b in zip(above, below, strict=True)])


def table(grid: dict[str, Any]) -> str:
    """Markdown tables of throughput, prefill and memory."""
    lines = []
    for figure, title in (
        ("throughput", "Throughput, guarded / plain (target for 12 × 768 and above: ≥ 0.99)"),
        ("prefill", "Prefill time, guarded / plain (target for 12 × 768 and above: ≤ 1.01)"),
    ):
        lines += [f"{title}; median [95 % interval]", ""]
        lines += [f"| model | units | {' | '.join(f'batch {size}' for size in BATCHES)} |"]
        lines += ["|---|--:|" + "---|" * len(BATCHES)]
        for name, found in grid.items():
            for units in UNITS:
                cells = [str(Interval(**found["cells"][units][size][figure])) for size in BATCHES]
                lines.append(f"| {name} | {units:,} | {' | '.join(cells)} |")
        lines.append("")
        controls = [
            Interval(**cells[units][size][f"{figure}_control"])
            for cells in (part["cells"] for part in grid.values())
            for units in UNITS
            for size in BATCHES
        ]
        low, high = min(c.median for c in controls), max(c.median for c in controls)
        lines += [f"Control, plain / plain, over all cells: medians from {low:.3f} to {high:.3f}.", ""]
    lines += [
        f"Memory of the guard beside the KV pool, MiB (float32, {ENGINE['max_num_seqs']} requests at most)",
        "",
    ]
    lines += [
        f"| model | {' | '.join(f'{units:,} units' for units in UNITS)} |",
        "|---|" + "--:|" * len(UNITS),
    ]
    for name, found in grid.items():
        taken = [f"{found['bytes'][units] / 2**20:.2f}" for units in UNITS]
        lines.append(f"| {name} | {' | '.join(taken)} |")
    return "\n".join(lines) + "\n"


def picture(grid: dict[str, Any], path: Path) -> None:
    """Both ratios by number of units, one panel for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figures = (("throughput", 0.99), ("prefill", 1.01))
    drawn, axes = pyplot.subplots(
        2, len(grid), figsize=(3.0 * len(grid), 5.2), sharex=True, sharey="row", squeeze=False
    )
    for column, (name, found) in enumerate(grid.items()):
        for row, (figure, target) in enumerate(figures):
            axis = axes[row][column]
            for shift, size in zip((0.93, 1.0, 1.07), BATCHES, strict=True):
                values = [Interval(**found["cells"][units][size][figure]) for units in UNITS]
                middle = [value.median for value in values]
                spans = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
                at = [units * shift for units in UNITS]
                axis.errorbar(at, middle, spans, marker="o", ms=3, lw=1, capsize=2, label=f"batch {size}")
            axis.axhline(target, color="grey", lw=0.8, ls="--")
            axis.set_xscale("log")
            axis.set_xticks(UNITS, [f"{units:,}" for units in UNITS])
            axis.minorticks_off()
            if row == 0:
                axis.set_title(name, fontsize=10)
            else:
                axis.set_xlabel("units")
            if column == 0:
                axis.set_ylabel(f"{figure}, guarded / plain", fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
