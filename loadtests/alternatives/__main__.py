"""``python -m loadtests.alternatives``: the guard beside other ways to refuse a prompt.

Stock vLLM, this guard, a gateway in two phases, a guard model in front and beside, a scanner of answers, and
products of others as far as they are installed: same machine, same prompts, same run, in rotating order.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from loadtests.alternatives import products, report, rounds, subjects
from loadtests.alternatives.client import FailedError, Target, ask, ask_all
from loadtests.alternatives.guard_model import digest
from loadtests.alternatives.products import Installations
from loadtests.alternatives.prompts import Prompts, divide
from loadtests.alternatives.servers import CHUNK, Fleet, own_alternatives
from loadtests.alternatives.subjects import Subject

SPARE = 8
"""Prompts of each kind for warming up, which no round uses."""


def measure(
    subject: Subject, count: int, shape: rounds.Shape, installed: Installations, folder: Path, logs: Path
) -> dict[str, Any]:
    """All rows for one model, and which products did not run and why."""
    click.echo(f"  {subject.name}: prompts", err=True)
    prompts, bundle = divide(
        subject.model,
        subject.bundle,
        folder / "bundle",
        int(1.4 * count * (shape.benign + shape.busy)) + 2 * SPARE,
        count * shape.harmful + SPARE,
    )
    labels, patterns = folder / "labels.json", folder / "patterns.json"
    labels.write_text(json.dumps([digest(prompt) for prompt in prompts.harmful]))
    with Fleet(folder, logs) as fleet:
        click.echo(f"  {subject.name}: engines", err=True)
        stock = fleet.vllm("stock engine", subject.model, "--no-enable-prefix-caching")
        guard = fleet.vllm("guard model", subject.model)
        _, gateway = fleet.guarded(subject.model, bundle)
        urls = {"stock": stock, "gateway": gateway, "guard": guard}
        target = Target("stock vLLM", stock, ("stock engine",))
        found, prompts = asyncio.run(cut_patterns(target, prompts, shape.tokens))
        patterns.write_text(json.dumps(found))
        count = min(count, (len(prompts.benign) - SPARE) // (shape.benign + shape.busy))
        click.echo(f"  {subject.name}: proxies", err=True)
        targets = own_alternatives(fleet, urls, labels, patterns)
        more, stopped = start_products(fleet, urls, labels, prompts, installed)
        spare = prompts.benign[-SPARE:], prompts.harmful[-SPARE:]
        running = []
        for target in (*targets, *more):
            if why := asyncio.run(tried(target, *spare, shape)):
                stopped[target.name] = why
                click.echo(f"  {target.name} is left out: {why}", err=True)
            else:
                running.append(target)
        rows: list[dict[str, Any]] = []

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            (folder / "rows.json").write_text(json.dumps(rows))

        click.echo(f"  {subject.name}: {count} rounds of {len(running)}", err=True)
        asyncio.run(rounds.run(running, fleet.groups, prompts, count, shape, keep))
    report.count_tokens(rows, subject.model)
    return {"rows": rows, "stopped": stopped, "shape": shape._asdict(), "rounds": count}


async def cut_patterns(stock: Target, prompts: Prompts, tokens: int) -> tuple[list[str], Prompts]:
    """What the scanner looks for, and the prompts without those whose answers hold it all the same.

    It is the first chunk of the model's answer to each prompt that is to be refused.
    """
    from aiohttp import ClientSession

    async with ClientSession() as session:
        unsafe = await ask_all(session, stock, prompts.harmful, CHUNK, 8)
        others = await ask_all(session, stock, prompts.benign, tokens, 8)
    found = sorted({answer.text for answer in unsafe})
    pairs = zip(prompts.benign, others, strict=True)
    benign = [prompt for prompt, said in pairs if not any(pattern in said.text for pattern in found)]
    return found, prompts._replace(benign=benign)


def start_products(
    fleet: Fleet, urls: dict[str, str], labels: Path, prompts: Prompts, installed: Installations
) -> tuple[list[Target], dict[str, str]]:
    """Those that start, and what stopped the others."""
    stock = urls["stock"]
    wishes = {
        "LiteLLM": installed.litellm
        and (lambda: products.litellm(fleet, installed.litellm, stock, urls["gateway"])),
        "NeMo Guardrails": installed.nemo
        and (lambda: products.nemo(fleet, installed.nemo, stock, urls["guard"], labels)),
        "LLM Guard": installed.llm_guard
        and (lambda: products.llm_guard(fleet, installed.llm_guard, stock, prompts.harmful)),
    }
    targets, stopped = [], {}
    for name, start in wishes.items():
        if not start:
            stopped[name] = "no installation was named"
            continue
        try:
            targets.append(start())
        except (click.ClickException, OSError) as error:
            stopped[name] = str(error)
    return targets, stopped


async def tried(target: Target, benign: list[str], harmful: list[str], shape: rounds.Shape) -> str | None:
    """Warm an alternative up; None if it answers and refuses as it should, else what is wrong."""
    from aiohttp import ClientError, ClientSession

    try:
        async with ClientSession() as session:
            answers = await ask_all(session, target, benign, shape.tokens, shape.at_once)
            refusals = [await ask(session, target, text, shape.tokens) for text in harmful[:2]]
    except (FailedError, ClientError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    if any(answer.refused != target.refuses for answer in refusals):
        return "it answered a prompt that was to be refused"
    if any(answer.refused for answer in answers):
        return "it refused a prompt that was to be answered"
    return None


@click.command(help=__doc__)
@click.option("--rounds", "count", default=10, show_default=True)
@click.option("--subject", "names", multiple=True, type=click.Choice(["random", "lab"]), help="default: both")
@click.option(
    "--litellm",
    type=click.Path(path_type=Path),
    envvar="NEURONGUARD_LITELLM",
    help="the command litellm of an installation of litellm[proxy]",
)
@click.option(
    "--nemo",
    type=click.Path(path_type=Path),
    envvar="NEURONGUARD_NEMO",
    help="the command nemoguardrails of an installation of nemoguardrails[server]",
)
@click.option(
    "--llm-guard",
    type=click.Path(path_type=Path),
    envvar="NEURONGUARD_LLM_GUARD",
    help="the Python of an installation of llm-guard and aiohttp",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/bench"), show_default=True)
def main(
    count: int,
    names: tuple[str, ...],
    litellm: Path | None,
    nemo: Path | None,
    llm_guard: Path | None,
    out: Path,
) -> None:
    """Measure and print the tables."""
    click.echo(run(count, names, Installations(litellm, nemo, llm_guard), out))


def run(
    count: int = 10,
    names: tuple[str, ...] = (),
    installed: Installations | None = None,
    out: Path = Path("results/bench"),
) -> str:
    """Measure, write ``alternatives.json``, ``.md`` and ``.png`` into ``out``, and return the second."""
    from loadtests.bench import machine

    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"machine": machine() | {"load": os.getloadavg()}, "subjects": {}}
    with tempfile.TemporaryDirectory() as name:
        for kind in names or ("random", "lab"):
            folder = Path(name) / kind
            folder.mkdir()
            subject = subjects.random_large(folder) if kind == "random" else subjects.lab()
            document["subjects"][subject.name] = measure(
                subject, count, subjects.SHAPES[kind], installed or Installations(), folder, out
            )
            report.write(document, out)
    return (out / "alternatives.md").read_text()


if __name__ == "__main__":
    main()
