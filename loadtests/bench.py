"""``make bench``: what the guard costs inside the engine, against plain vLLM, in pairs in one run.

Two engines live side by side, one plain and one guarded, each in its own process with one thread. Every batch
runs on both, in alternating order; what is reported are medians of per-pair ratios of process CPU time with
95 % bootstrap intervals. Wall-clock time of the same pairs is in the JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import click
import numpy as np

from guard.bundle import Bundle, Site
from guard.lab import resolve
from loadtests import grid, patched, random_model, sequence_cost
from loadtests.batches import batches, with_threshold
from loadtests.first_token import measure
from loadtests.gateway.__main__ import run as measure_gateway
from loadtests.pairs import Child, Interval, run_pairs

LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
ENGINE = {"max_model_len": 512, "max_num_batched_tokens": 2048, "max_num_seqs": 32, "block_size": 32}
NEURONS_PER_LAYER = 100


def large_model(directory: Path, seed: int) -> tuple[Path, Path, Path]:
    """The random 12 × 768 model with a bundle that passes everything and one that refuses everything."""
    model = random_model.make_model(directory / "large", LARGE)
    rng = np.random.default_rng(seed)
    units = [tuple(sorted(rng.choice(2048, NEURONS_PER_LAYER, replace=False).tolist())) for _ in range(12)]
    sites = tuple(Site(layer=layer, kind="mlp", units=chosen) for layer, chosen in enumerate(units))
    (prompts,) = batches(1, 24, (20, 60), 256, seed)
    bundle = random_model.make_bundle(directory / "bundle", model, sites, prompts)
    return (
        model,
        with_threshold(bundle, directory / "pass", 1.0),
        with_threshold(bundle, directory / "refuse", 0.0),
    )


def compare(
    model: Path, passing: Path, refusing: Path, vocabulary: int, pairs: int, folder: Path
) -> dict[str, Any]:
    """All figures for one model."""
    engines = {
        name: Child(model, bundle, ENGINE, folder / f"{model.name}-{name}.log")
        for name, bundle in (("plain", None), ("pass", passing), ("refuse", refusing))
    }
    try:
        for engine in engines.values():
            engine.wait_ready()
        warm = batches(3, 8, (30, 120), vocabulary, seed=1)
        for engine in engines.values():
            for prompts in warm:
                engine.run(prompts, 8)
        plain, passing_engine, refusing_engine = engines["plain"], engines["pass"], engines["refuse"]
        click.echo(f"  {model.name}: throughput", err=True)
        whole = run_pairs(plain, passing_engine, batches(pairs, 16, (30, 120), vocabulary, seed=2), 32)
        click.echo(f"  {model.name}: prefill", err=True)
        prefill = run_pairs(plain, passing_engine, batches(pairs, 4, (100, 200), vocabulary, seed=3), 1)
        click.echo(f"  {model.name}: time to refusal", err=True)
        refusal = run_pairs(plain, refusing_engine, batches(pairs, 1, (60, 120), vocabulary, seed=4), 1)
    finally:
        for engine in engines.values():
            engine.close()
    click.echo(f"  {model.name}: time to refusal over HTTP", err=True)
    (prompts,) = batches(1, 2 * pairs, (60, 120), vocabulary, seed=5)
    step = [1e6 * (p.guarded["cpu"] - p.plain["cpu"]) / p.plain["steps"] for p in whole]
    return {
        "throughput": Interval.of([1 / p.ratio("cpu") for p in whole])._asdict(),
        "prefill": Interval.of([p.ratio("cpu") for p in prefill])._asdict(),
        "refusal": Interval.of([p.ratio("wall") for p in refusal])._asdict(),
        "http": measure(model, refusing, prompts, folder),
        "microseconds_per_step": Interval.of(step)._asdict(),
        "plain_step_microseconds": float(np.median([1e6 * p.plain["cpu"] / p.plain["steps"] for p in whole])),
        "refused_tokens": sum(p.guarded["tokens"] for p in refusal),
        "pairs": {name: [p._asdict() for p in rows] for name, rows in
                  (("throughput", whole), ("prefill", prefill), ("refusal", refusal))},
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Markdown table of the figures."""
    rows = [
        ("throughput, guarded / plain", ("throughput",), "≥ 0.97"),
        ("prefill time, guarded / plain", ("prefill",), "≤ 1.03"),
        ("in the engine: time to refusal / time to first token of plain vLLM", ("refusal",), "≤ 1"),
        ("over HTTP, guarded engine: the same", ("http", "engine"), "≤ 1"),
        ("over HTTP, through the gateway: the same", ("http", "gateway"), ""),
        ("plain vLLM's time to first token over HTTP, ms", ("http", "plain_milliseconds"), ""),
        ("CPU time the guard adds to a step, µs", ("microseconds_per_step",), ""),
    ]
    models = list(results["models"])
    lines = [
        f"| median [95 % interval] | target | {' | '.join(models)} |",
        "|---|---|" + "--:|" * len(models),
    ]
    for title, path, target in rows:
        cells = []
        for model in models:
            value = Interval(**reduce(getitem, path, results["models"][model]))
            digits = 3 if "/" in title or "same" in title else 1
            cells.append(f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]")
        lines.append(f"| {title} | {target} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option(
    "--pairs",
    type=click.IntRange(min=4),
    default=40,
    show_default=True,
    help="batches a figure; each runs on both engines",
)
@click.option(
    "--lab", default="models/lab:lab-partial", show_default=True, help="a second model: DIR or LAB:VARIANT"
)
@click.option(
    "--lab-bundle",
    type=click.Path(path_type=Path, exists=True),
    default=Path("models/lab/bundle"),
    show_default=True,
    help="its bundle",
)
@click.option(
    "--part",
    type=click.Choice(["all", "pairs", "grid", "patches", "sequence", "gateway", "alternatives"]),
    default="all",
    show_default=True,
    help="two models in detail; models, units and batches of several sizes; patches; "
    "a probe of every token; a gateway and a mock; other ways to refuse. The last two are not in all",
)
@click.option(
    "--grid-seconds", default=20.0, show_default=True, help="CPU seconds for each figure of that grid"
)
@click.option(
    "--grid-model",
    "grid_models",
    multiple=True,
    type=click.Choice(list(grid.MODELS)),
    help="only this model of that grid; repeatable",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/bench"), show_default=True)
def main(
    pairs: int,
    lab: str,
    lab_bundle: Path,
    part: str,
    grid_seconds: float,
    grid_models: tuple[str, ...],
    out: Path,
) -> None:
    """Run the benchmark, write JSON and tables; what was measured is kept after every model."""
    out.mkdir(parents=True, exist_ok=True)
    if part == "gateway":
        click.echo(measure_gateway(out=out))
        return
    if part == "alternatives":
        from loadtests.alternatives.__main__ import main as compare_with_others

        compare_with_others(["--out", str(out)], standalone_mode=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        if part in ("all", "pairs"):
            results: dict[str, Any] = {"models": {}, "pairs": pairs, "machine": machine()}
            for name, (model, passing, refusing), vocabulary in subjects(Path(folder), lab, lab_bundle):
                results["models"][name] = compare(model, passing, refusing, vocabulary, pairs, out)
                (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
                (out / "bench.md").write_text(table(results))
            click.echo(table(results))
        if part in ("all", "patches"):

            def keep(costs: dict[str, Any]) -> None:
                text = json.dumps({**costs, "machine": machine()}, indent=1)
                (out / "patches.json").write_text(text + "\n")
                (out / "patches.md").write_text(patched.table(costs))

            click.echo(patched.table(patched.measure(Path(folder) / "patches", out, pairs // 2, keep)))
        if part in ("all", "sequence"):

            def keep_sequence(costs: dict[str, Any]) -> None:
                text = json.dumps({**costs, "machine": machine()}, indent=1)
                (out / "sequence-cost.json").write_text(text + "\n")
                (out / "sequence-cost.md").write_text(sequence_cost.table(costs))

            costs = sequence_cost.measure(Path(folder) / "sequence", out, pairs, keep_sequence)
            click.echo(sequence_cost.table(costs))
        if part in ("all", "grid"):
            found: dict[str, Any] = {"models": {}, "seconds": grid_seconds, "machine": machine()}
            for name in grid_models or grid.MODELS:
                found["models"][name] = grid.measure(name, Path(folder), out, grid_seconds)
                (out / "grid.json").write_text(json.dumps(found, indent=1) + "\n")
                (out / "grid.md").write_text(grid.table(found["models"]))
                grid.picture(found["models"], out / "grid.png")
            click.echo(grid.table(found["models"]))


def subjects(folder: Path, lab: str, lab_bundle: Path) -> Iterator[tuple[str, tuple[Path, Path, Path], int]]:
    """Name, model with its two bundles, and vocabulary of what is compared."""
    yield f"random 12 × 768, {12 * NEURONS_PER_LAYER} neurons", large_model(folder, seed=0), 256
    bundle = Bundle.load(lab_bundle)
    bundles = (
        with_threshold(bundle, folder / "lab-pass", 1.0),
        with_threshold(bundle, folder / "lab-refuse", 0.0),
    )
    name = f"{bundle.card.model.name}, {bundle.card.features} neurons"
    yield name, (resolve(lab)[0], *bundles), 4000


def machine() -> dict[str, str]:
    """Where the figures come from."""
    import torch
    import vllm

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
