"""``python -m loadtests.load``: stock vLLM, and the guard observing and enforcing, under load.

GuideLLM sweeps each of them from one request at a time to the most it takes, and runs one constant rate, the
same for all; Locust runs a mix of clients, each waiting for its answers (closed loop) and at a fixed pace
(open loop). Both tools come from installations of their own. Two engines are up, one of them is busy.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from loadtests.alternatives import subjects
from loadtests.alternatives.processes import Group
from loadtests.alternatives.prompts import Prompts, divide
from loadtests.alternatives.proxy import REFUSAL
from loadtests.alternatives.servers import Fleet
from loadtests.load import guidellm, mix, report

TENANTS = 20
TOKENS = 24
LONGEST = 380
"""Tokens of a long prompt, at most; the engines take 512 with the answer."""


def keys(mode: str) -> list[str]:
    """One API key for each tenant under a policy."""
    return [f"sk-load-{mode}-{number}" for number in range(TENANTS)]


def policies() -> dict[str, Any]:
    """The gateway's policy file: one policy that observes and one that enforces, each with all tenants."""
    refusal = {"style": "message", "text": REFUSAL}
    return {
        "policies": {
            "default": {"refusal": refusal},
            "observe": {"mode": "observe", "refusal": refusal},
            "enforce": {"refusal": refusal},
        },
        "keys": [
            {
                "sha256": hashlib.sha256(key.encode()).hexdigest(),
                "tenant": f"tenant-{number}",
                "policy": mode,
            }
            for mode in ("observe", "enforce")
            for number, key in enumerate(keys(mode))
        ],
    }


def measure(
    guide: Path | None, locust: Path | None, seconds: float, sweep: int, folder: Path, out: Path
) -> dict[str, Any]:
    """Everything, mode by mode."""
    subject = subjects.lab()
    prompts, bundle = divide(subject.model, subject.bundle, folder / "bundle", 400, 60)
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts.benign))
    found: dict[str, Any] = {"guidellm": {}, "mix": {}, "cpu_ms_per_request": {}}
    with Fleet(folder, out) as fleet:
        # Prompts come again and again: a cache would be warmer for whoever is asked later.
        stock = fleet.vllm("stock engine", subject.model, "--no-enable-prefix-caching")
        _, gateway = fleet.guarded(subject.model, bundle, "--no-enable-prefix-caching", served=policies())
        urls = {"off": stock, "observe": gateway, "enforce": gateway}
        server = guidellm.Server(stock, "none", "model", subject.model)
        rate: float | None = None
        for mode, url in urls.items():
            key = keys(mode)[0]
            if guide is not None:
                click.echo(f"  GuideLLM, {mode}", err=True)
                rates = guidellm.Rates(seconds, sweep, rate)
                at = server._replace(url=url, key=key)
                found["guidellm"][mode] = ran = guidellm.sweep(guide, at, rates, data, TOKENS, out / mode)
                rate = rate or max(r["requests_per_second"] for r in ran["sweep"]) / 2
            if locust is not None:
                groups = ["stock engine"] if mode == "off" else ["guarded engine", "gateway"]
                found["mix"][mode] = {}
                for loop, users, pace in (("closed", 14, 0.0), ("open", 28, 2.0)):
                    click.echo(f"  mix, {mode}, {loop}", err=True)
                    wish = mix.Wish(
                        url, mode, keys(mode), of_kinds(prompts), users, seconds, pace, tokens=TOKENS
                    )
                    before = _cpu(fleet.groups, groups)
                    mixed = mix.run(locust, wish, folder, f"{mode}-{loop}")
                    spent = _cpu(fleet.groups, groups) - before
                    found["mix"][mode][loop] = mixed
                    found["cpu_ms_per_request"][f"{mode}, {loop}"] = 1e3 * spent / mixed["all"]["requests"]
    return found


def of_kinds(prompts: Prompts) -> dict[str, list[str]]:
    """The mix's prompts by kind; a long one is the same few questions again and again."""
    long = [(text + " ") * (4 * LONGEST // (len(text) * 2)) + text for text in prompts.benign[:40]]
    return {"benign": prompts.benign, "harmful": prompts.harmful, "long": long}


def _cpu(groups: dict[str, Group], names: list[str]) -> float:
    return sum(groups[name].cpu_seconds for name in names)


@click.command(help=__doc__)
@click.option(
    "--guidellm",
    "guide",
    type=click.Path(path_type=Path),
    envvar="NEURONGUARD_GUIDELLM",
    help="the command; without it: no sweep",
)
@click.option(
    "--locust",
    type=click.Path(path_type=Path),
    envvar="NEURONGUARD_LOCUST",
    help="the command; without it: no mix",
)
@click.option("--seconds", default=10.0, show_default=True, help="for each rate, and for each run of the mix")
@click.option(
    "--sweep", default=4, show_default=True, help="rates of a sweep, the least and the most included"
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/load"), show_default=True)
def main(guide: Path | None, locust: Path | None, seconds: float, sweep: int, out: Path) -> None:
    """Measure and print the tables."""
    click.echo(run(guide, locust, seconds, sweep, out))


def run(
    guide: Path | None,
    locust: Path | None,
    seconds: float = 10.0,
    sweep: int = 4,
    out: Path = Path("results/load"),
) -> str:
    """Measure, write ``load.json``, ``load.md`` and ``load.png`` into ``out``, and return the second."""
    from loadtests.bench import machine

    out.mkdir(parents=True, exist_ok=True)
    facts = machine() | {"load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        found = measure(guide, locust, seconds, sweep, Path(name), out) | {"machine": facts}
    (out / "load.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "load.md").write_text(report.tables(found))
    if found["guidellm"]:
        report.picture(found, out / "load.png")
    return report.tables(found)


if __name__ == "__main__":
    main()
