"""``python -m loadtests.scaling``: writes the tables of ``docs/scaling.md`` anew, from formulas and results.

With ``--plain`` it first measures what the grid has ratios of: CPU seconds of its batches on plain vLLM.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Rule, Verdict
from loadtests import grid
from loadtests.batches import batches
from loadtests.scale import fit, projection
from loadtests.scale.formulas import Rank, patch_memory

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
UNITS = (1000, 5000)


def memory() -> str:
    """Memory of the guard against the grid's measurement, and of large bundles."""
    measured = json.loads((RESULTS / "grid.json").read_text("utf-8"))["models"]
    lines = ["| | units | formula, bytes | measured, bytes |", "|---|--:|--:|--:|"]
    for name, part in measured.items():
        for units, taken in part["bytes"].items():
            config = grid.MODELS[name]
            rank = Rank(int(units), config["num_hidden_layers"], 64, element=4, on_host=True)
            lines.append(f"| {name}, float32, 64 requests | {int(units):,} | {rank.memory:,} | {taken:,} |")
    for units in UNITS:
        rank = Rank(units, 32, projection.REQUESTS, element=2)
        title = f"any model, bfloat16, {projection.REQUESTS} requests"
        lines.append(f"| {title} | {units:,} | {rank.memory:,} | |")
    table = patch_memory([14336 // 20] * 32, patches=2, tokens=8192, element=2)
    lines.append(f"| 8B, two patches of 5 % of the neurons, 8,192 tokens | {32 * 716:,} | {table:,} | |")
    return "\n".join(lines)


def wire() -> str:
    """Bytes that travel with one request, for the default policy."""
    keys = Keyring.generate()
    decision = Decision(policy="default", rules=(Rule(above=0.5, action="refuse"),))
    nonce, digest = "n" * 24, "0" * 64
    directive = Directive(
        audience="engine-" + "0" * 16, expires=1.8e9 + 0.123456, nonce=nonce, body_sha256=digest,
        siblings=1, decision=decision,
    )  # fmt: skip
    verdict = Verdict(
        action="pass", decision="pass", probability=0.12345678901234567, logit=-1.2345678901234567,
        threshold=0.5, unsafe=False, mode="enforce", policy="default", bundle=digest, read="prompt_last",
        prompt_tokens=100, nonce=nonce,
    )  # fmt: skip
    order, answer = len(directive.seal(keys)), len(verdict.seal(keys))
    plain = len(verdict.model_dump_json())
    rows = [
        ("directive, sealed: gateway to API server", order),
        ("the same: API server to engine core", order),
        ("verdict: engine core to API server", plain),
        ("verdict, sealed: API server to gateway", answer),
        ("**all**", 2 * order + plain + answer),
    ]
    return "\n".join(["| with each request | bytes |", "|---|--:|", *(f"| {t} | {n:,} |" for t, n in rows)])


def fitted() -> fit.Fit:
    """The grid's prefill cells and the formula fitted to them."""
    measured = json.loads((RESULTS / "grid.json").read_text("utf-8"))["models"]
    plain = json.loads((RESULTS / "scaling.json").read_text("utf-8"))["plain_seconds"]
    return fit.fit(fit.cells(measured, plain))


def times() -> str:
    """Coefficients of the fit, and every cell with its residual."""
    found = fitted()
    lines = ["| CPU time of the guard for | µs |", "|---|--:|"]
    lines += [f"| {t} | {v:.1f} |" for t, v in zip(fit.TERMS, found.coefficients, strict=True)]
    lines += [
        "",
        "| model | units | batch | measured, µs [95 % interval] | formula, µs | residual, µs | control, µs |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell, value in zip(found.cells, found.fitted, strict=True):
        lines.append(
            f"| {cell.model} | {cell.units:,} | {cell.batch} | "
            f"{cell.measured:,.0f} [{cell.low:,.0f}, {cell.high:,.0f}] | "
            f"{value:,.0f} | {cell.measured - value:+,.0f} | {cell.control:,.0f} |"
        )
    lines += ["", f"The formula lies within the interval in {found.within} of {len(found.cells)} cells."]
    return "\n".join(lines)


def projected() -> str:
    """Guard's share of a decode and of a prefill step for larger models."""
    lines = [
        "| model | GPUs | units | layers read | guard, MiB a GPU | decode step, ms | guard, µs | share "
        "| prefill step, ms | guard, µs | share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for served in projection.SERVED:
        for units in UNITS:
            for places in (served.layers, served.layers // 8):
                rank = projection.rank_of(served, units, places)
                costs = (projection.decode(served, rank), projection.prefill(served, rank))
                parts = [f"{1e3 * c.plain:.1f} | {1e6 * c.guard:.0f} | {100 * c.share:.2f} %" for c in costs]
                lines.append(
                    f"| {served.name} | {served.gpus} | {units:,} | {places} | {rank.memory / 2**20:.1f} | "
                    f"{' | '.join(parts)} |"
                )
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with every table made anew."""
    made = {"memory": memory, "wire": wire, "times": times, "projection": projected}

    def block(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- begin: {name} -->\n{made[name]()}\n<!-- end: {name} -->"

    return BLOCK.sub(block, text)


def plain_seconds(rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds of the grid's prefill batches on plain vLLM, by model and batch size."""
    from loadtests.pairs import Child
    from loadtests.random_model import make_model

    found: dict[str, dict[str, float]] = {}
    measured: dict[str, Any] = json.loads((RESULTS / "grid.json").read_text("utf-8"))["models"]
    with tempfile.TemporaryDirectory() as folder:
        for name in measured:
            model = make_model(Path(folder) / name, grid.MODELS[name])
            engine = Child(model, None, grid.ENGINE, Path(folder) / "engine.log")
            try:
                engine.wait_ready()
                found[name] = {}
                for size in grid.BATCHES:
                    work = batches(rounds + 2, size, grid.LENGTH, 256, seed=20 + size)
                    seconds = [engine.run(batch, 1)["cpu"] for batch in work]
                    found[name][str(size)] = median(seconds[2:])
            finally:
                engine.close()
    return found


@click.command(help=__doc__)
@click.option("--plain", is_flag=True, help="measure plain vLLM's CPU seconds anew")
@click.option("--rounds", default=7, show_default=True, help="batches of each size for that")
def main(plain: bool, rounds: int) -> None:
    """Write the page."""
    if plain:
        from loadtests.bench import machine

        document = {"plain_seconds": plain_seconds(rounds), "rounds": rounds, "machine": machine()}
        (RESULTS / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
    click.echo(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
