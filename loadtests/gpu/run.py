"""Check the guard on a machine with an NVIDIA GPU: ``python -m loadtests.gpu.run``.

Each check runs in a process of its own; OUT/report.md and OUT/report.json are written after every one. The
exit status is 0 if nothing failed, 1 if something did, 2 if nothing can be run here.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from loadtests.gpu.checks import Check, select
from loadtests.gpu.isolate import Outcome, run_call, run_process
from loadtests.gpu.report import Report

OVERRIDE_ENV = "NEURONGUARD_UNTESTED_VLLM"


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results/gpu"), show_default=True, help="folder"
)
@click.option("--only", multiple=True, metavar="NAME", help="a check or a group of them; repeatable")
@click.option("--list", "show", is_flag=True, help="show the checks and end")
@click.option("--minutes", type=float, help="start no check after so long, and end the one that runs")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--vllm/--no-vllm", "with_vllm", default=True, help="checks of the whole engine")
def main(
    out: Path, only: tuple[str, ...], show: bool, minutes: float | None, device: str, with_vllm: bool
) -> None:
    """Run the selected checks."""
    try:
        checks = [check for check in select(only) if with_vllm or not check.needs_vllm]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if show:
        for check in checks:
            click.echo(f"{check.name:50} {check.title}{'' if check.on_cpu else ' (GPU only)'}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the check that runs is ended too
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = machine(out)
    if facts.get("torch") is None:
        click.echo(f"torch does not import here; see {out}/machine.log", err=True)
        sys.exit(2)
    if device == "cuda" and not facts.get("gpu"):
        click.echo("no CUDA device is usable here; --device cpu runs what a CPU can", err=True)
        sys.exit(2)
    sys.exit(1 if run(checks, facts, out, device, minutes) else 0)


def machine(out: Path) -> dict[str, Any]:
    """Versions, read in a process of their own."""
    target = out / "machine.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "loadtests.gpu.machine", str(target)]
    run_process(command, out / "machine.log", seconds=300, environment={})
    found: dict[str, Any] = json.loads(target.read_text("utf-8")) if target.exists() else {}
    return found


def run(checks: list[Check], facts: dict[str, Any], out: Path, device: str, minutes: float | None) -> int:
    """Run the checks one after the other; returns how many failed."""
    report = Report(out, facts, device, len(checks))
    end = None if minutes is None else time.monotonic() + 60 * minutes
    environment = {OVERRIDE_ENV: facts["vllm"]} if facts.get("vllm") else {}
    for number, check in enumerate(checks, 1):
        click.echo(f"[{number}/{len(checks)}] {check.name} … ", nl=False)
        left = None if end is None else end - time.monotonic()
        why = obstacle(check, facts, device, left)
        if why:
            outcome = Outcome("could not be done", [why], {}, 0.0)
        else:
            seconds = check.seconds if left is None else min(check.seconds, left)
            outcome = run_call(
                check.name,
                check.call,
                check.options,
                out=out,
                device=device,
                seconds=seconds,
                environment=environment,
            )
        report.add(check.name, check.title, outcome)
        click.echo(
            f"{outcome.state} in {outcome.seconds:.0f} s{''.join(f'; {why}' for why in outcome.why[:3])}"
        )
    click.echo(f"{report.failed} failed; {out / 'report.md'}")
    return report.failed


def obstacle(check: Check, facts: dict[str, Any], device: str, left: float | None) -> str | None:
    """Why a check cannot even be started."""
    if left is not None and left < 5:
        return "the time given by --minutes is over"
    if device == "cpu" and not check.on_cpu:
        return "it needs a GPU"
    if check.needs_vllm and not facts.get("vllm"):
        return f"vLLM does not import: {facts.get('vllm_error')}"
    return None


if __name__ == "__main__":
    main()
