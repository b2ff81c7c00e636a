"""What the guard costs by model size, number of units and batch size: one plain engine, one for each number.

All engines of a model live side by side, each in its own process with one thread. Every batch runs on all of
them in rotating order; a figure is the median over batches of guarded over plain process CPU time.
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
LENGTH = (24, 72)
NEW_TOKENS = 16


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


def measure(name: str, folder: Path, logs: Path, pairs: int) -> dict[str, Any]:
    """All cells of one model: ``{"cells": {units: {batch: figures}}, "bytes": {units: bytes}}``."""
    config = MODELS[name]
    model = random_model.make_model(folder / name, config)
    engines = {0: Child(model, None, ENGINE, logs / f"grid-{name}-plain.log")}
    (fitting,) = batches(1, 24, LENGTH, 256, seed=0)
    for units in UNITS:
        sites = spread(units, config["num_hidden_layers"], config["intermediate_size"], seed=units)
        bundle = random_model.make_bundle(folder / f"{name}-{units}", model, sites, fitting)
        passing = with_threshold(bundle, folder / f"{name}-{units}-pass", 1.0)
        engines[units] = Child(model, passing, ENGINE, logs / f"grid-{name}-{units}.log")
    try:
        facts = {units: engine.wait_ready() for units, engine in engines.items()}
        for engine in engines.values():
            for prompts in batches(3, 8, LENGTH, 256, seed=1):
                engine.run(prompts, NEW_TOKENS)
        cells: dict[int, dict[int, Any]] = {units: {} for units in UNITS}
        for size in BATCHES:
            click.echo(f"  {name}: batches of {size}", err=True)
            whole = rotate(engines, batches(pairs, size, LENGTH, 256, seed=10 + size), NEW_TOKENS)
            prefill = rotate(engines, batches(pairs, size, LENGTH, 256, seed=20 + size), 1)
            for units in UNITS:
                cells[units][size] = {
                    "throughput": ratio(whole[0], whole[units])._asdict(),
                    "prefill": ratio(prefill[units], prefill[0])._asdict(),
                }
    finally:
        for engine in engines.values():
            engine.close()
    return {"cells": cells, "bytes": {units: facts[units]["guard_bytes"] for units in UNITS}}


def rotate(
    engines: dict[int, Child], prompts: list[list[list[int]]], new_tokens: int
) -> dict[int, list[float]]:
    """CPU seconds of each batch on each engine; every engine comes first as often as any other."""
    names, seconds = list(engines), {name: [] for name in engines}
    for turn, batch in enumerate(prompts):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            seconds[name].append(engines[name].run(batch, new_tokens)["cpu"])
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
