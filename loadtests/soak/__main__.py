"""``python -m loadtests.soak --minutes 60``: mixed traffic on the lab model, and what leaks of it.

Starts a guarded engine and a gateway, sends traffic that is answered, refused, checked, broken off and given
up, and looks at memory, files, threads, tasks and state of requests in gateway, API server and engine core.
Ends with status 1 if something has leaked or failed. Five minutes are enough for continuous integration.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import click

from loadtests.alternatives import subjects
from loadtests.alternatives.prompts import divide
from loadtests.alternatives.servers import TENANTS, Fleet, key_of
from loadtests.soak.leaks import table
from loadtests.soak.run import soak
from loadtests.soak.traffic import Traffic
from loadtests.soak.watch import Watch


@click.command(help=__doc__)
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--clients", default=8, show_default=True)
@click.option("--pause", default=0.2, show_default=True, help="mean seconds between a client's requests")
@click.option("--allow-mb", default=20.0, show_default=True, help="that a process may grow by, lower bound")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/soak"), show_default=True)
def main(minutes: float, clients: int, pause: float, allow_mb: float, out: Path) -> None:
    """Run the soak, and write ``soak.json`` and ``soak.md``."""
    from loadtests.bench import machine

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, subject = Path(name), subjects.lab()
        prompts, bundle = divide(subject.model, subject.bundle, folder / "bundle", 400, 60)
        with Fleet(folder, out) as fleet:
            engine, gateway = fleet.guarded(subject.model, bundle)
            keys = [key_of(tenant) for tenant in TENANTS]
            traffic = Traffic(gateway, "model", prompts.benign, prompts.harmful, keys, pause=pause)
            groups = {name: fleet.groups[group].pid for name, group in
                      (("gateway", "gateway"), ("engine", "guarded engine"))}  # fmt: skip
            metrics = {"gateway": f"{gateway}/metrics", "engine": f"{engine}/metrics"}
            warm = min(60.0, 10 * minutes)
            done = asyncio.run(
                soak(traffic, Watch(groups, metrics), 60 * minutes, clients=clients,
                     interval=max(1.0, minutes / 4), warm=warm, megabytes=allow_mb)
            )  # fmt: skip
    facts = {"machine": machine(), "minutes": minutes, "clients": clients}
    (out / "soak.json").write_text(json.dumps(done.document | facts, indent=1) + "\n")
    lines = [f"{sum(done.counts.values())} requests in {minutes:g} minutes.", "", table(done.findings)]
    (out / "soak.md").write_text("\n".join(lines))
    click.echo("\n".join(lines))
    if done.problems:
        raise click.ClickException("; ".join(done.problems))


if __name__ == "__main__":
    main()
