"""``python -m loadtests.scale``: throughput and time to first token of four layouts, guarded and not.

One engine; two replicas behind one gateway; two data-parallel ranks; two tensor-parallel ranks. In each,
plain vLLM (asked directly, replicas in turn) and guarded vLLM behind its gateway run side by side and take
turns on the same prompts, a round each. Every engine or rank has one thread. A layout that is finished is
kept: a second call goes on with the next.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from guard.sealed import Keyring
from loadtests import grid, random_model
from loadtests.batches import batches, with_threshold
from loadtests.bench import machine
from loadtests.scale.load import measure
from loadtests.scale.report import page, picture, table
from loadtests.scale.servers import LAYOUTS, running

MODEL = "12 × 768"
UNITS = 1200


def make(folder: Path) -> tuple[Path, Path]:
    """The random model, and a bundle that lets everything pass."""
    model = random_model.make_model(folder / "model", grid.MODELS[MODEL])
    (fitting,) = batches(1, 24, (20, 60), 256, seed=0)
    sites = grid.spread(UNITS, 12, grid.MODELS[MODEL]["intermediate_size"], seed=0)
    bundle = random_model.make_bundle(folder / "bundle", model, sites, fitting)
    return model, with_threshold(bundle, folder / "pass", 1.0)


def run(name: str, model: Path, bundle: Path, folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds of one layout: ``{"off": [figures], "on": [figures]}``, the same prompts in both."""
    keys = folder / f"{name}.keys"
    Keyring.generate().save(keys)
    logs = folder / name
    logs.mkdir()
    with running(LAYOUTS[name], model, bundle, keys, logs) as servers:
        for way in servers:
            asyncio.run(measure(servers[way], round_=-1))
        found: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
        for turn in range(rounds):
            for way in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[way].append(asyncio.run(measure(servers[way], turn)))
    return found


@click.command(help=__doc__)
@click.option(
    "--rounds",
    default=5,
    type=click.IntRange(2),
    show_default=True,
    help="of each way in each layout",
)
@click.option("--layout", "layouts", multiple=True, type=click.Choice(list(LAYOUTS)), help="only these")
@click.option("--fresh", is_flag=True, help="forget what was measured before")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
@click.option("--image", type=click.Path(path_type=Path), default=Path("docs/images/scale.png"))
def main(rounds: int, layouts: tuple[str, ...], fresh: bool, out: Path, image: Path) -> None:
    """Measure what is missing; write JSON, page and picture after every layout."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "scale.json"
    results: dict[str, Any] = {"layouts": {}, "rounds": rounds}
    if file.exists() and not fresh:
        earlier = json.loads(file.read_text("utf-8"))
        if earlier["rounds"] == rounds:
            results = earlier
    results |= {"machine": machine(), "cores": os.cpu_count()}
    missing = [name for name in layouts or LAYOUTS if name not in results["layouts"]]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, bundle = make(folder) if missing else (folder, folder)
        for name in missing:
            click.echo(f"  {LAYOUTS[name].title}", err=True)
            results["layouts"][name] = run(name, model, bundle, folder, rounds)
            file.write_text(json.dumps(results, indent=1) + "\n")
            (out / "scale.md").write_text(page(results))
            picture(results["layouts"], image)
    click.echo(table(results["layouts"]))


if __name__ == "__main__":
    main()
