"""``python -m loadtests.startup``: how long ``make serve`` takes until it answers, and where the time goes.

Warm starts: the environment is made, the lab model's checkpoint is folded, the files have been read before.
The ways take turns, one start each. Everything is watched from outside: when each process came into being,
when the engine first answers over HTTP, when its self-test has passed, and when the endpoint is announced;
and the CPU time that each process has used by then, which other work on the machine changes less.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from guard.serve.children import Service
from guard.serve.plan import free_port
from guard.serve.supervise import probe

ROLES = {
    "guard.serve --": "supervisor",
    "guard.engine": "API server",
    "VLLM::EngineCore": "engine core",
    "VLLM::Worker": "worker",
    "-m service": "gateway",
}
"""Processes by a part of their command lines; what is left over is small."""
STAGES = (
    "supervisor",
    "imports, checks, configuration",
    "engine core",
    "worker: model, taps, cache; routes",
    "self-test",
    "gateway sees it",
)
WAYS = {
    "earlier": "*Earlier* is an older commit: three processes import the libraries in turn.",
    "spawned": "*Spawned* is `VLLM_WORKER_MULTIPROC_METHOD=spawn`: three processes import them in turn.",
}
POLL = 0.05
TIMEOUT = 600.0
"""Seconds for one start, on a machine that is busy otherwise."""


class Watched:
    """What was seen of the processes below one process."""

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)
        self._seen: dict[int, tuple[float, str]] = {}
        self._cpu: dict[int, float] = {}

    def look(self) -> None:
        """Note every process that is there now, and its CPU time so far."""
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                # vLLM renames its processes after they were made.
                self._seen[process.pid] = (process.create_time(), " ".join(process.cmdline()))
                self._cpu[process.pid] = times.user + times.system

    def born(self, role: str) -> float | None:
        """When the first process of a role was made, in seconds since the epoch."""
        return min((born for born, command in self._seen.values() if role_of(command) == role), default=None)

    def command(self, role: str) -> list[str]:
        """The words of its command line."""
        commands = (command.split() for _, command in self._seen.values() if role_of(command) == role)
        return next(commands, [])

    def mebibytes(self) -> float:
        """Memory of all of them together, what they share counted once."""
        total = 0.0
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss / 2**20
        return round(total)

    def cpu(self) -> dict[str, float]:
        """CPU seconds by role."""
        found = dict.fromkeys([*ROLES.values(), "others"], 0.0)
        for pid, seconds in self._cpu.items():
            found[role_of(self._seen[pid][1]) or "others"] += seconds
        return {role: round(seconds, 2) for role, seconds in found.items()}


def role_of(command: str) -> str | None:
    """Which process a command line belongs to."""
    return next((role for part, role in ROLES.items() if part in command), None)


def start(tree: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One start from a checkout: seconds until it is ready, by stage, and CPU seconds by process."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as output:
        began = time.time()
        command = [sys.executable, "-m", "guard.serve", "--port", str(port)]
        # psutil needs the process; what it prints goes to a file, which nobody has to keep emptying.
        with subprocess.Popen(
            command, cwd=tree, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        ) as child:
            try:
                return _watch(child, output, began)
            finally:
                child.send_signal(signal.SIGTERM)
                child.wait(60)


def _watch(child: subprocess.Popen[bytes], output: Any, began: float) -> dict[str, Any]:
    watched, marks = Watched(child.pid), dict[str, float]()
    while time.time() - began < TIMEOUT:
        watched.look()
        if "passed" not in marks and (command := watched.command("API server")):
            engine = Service("engine", (), {}, int(command[command.index("--port") + 1]), "/guard/status")
            passed, detail = probe(engine)
            if passed or detail != "loading":
                marks.setdefault("answers", time.time())
            if passed:
                marks["passed"] = time.time()
        output.seek(0)
        text = output.read()
        if "Guarded endpoint" in text:
            break
        if child.poll() is not None:
            raise SystemExit(f"a start failed:\n{text}")
        time.sleep(POLL)
    else:
        raise SystemExit(f"a start took more than {TIMEOUT:.0f} s:\n{text}")
    ready = time.time()
    made = [watched.born(role) or ready for role in ("API server", "engine core", "worker")]
    edges = [began, *made, marks.get("answers", ready), marks.get("passed", ready), ready]
    lengths = [max(0.0, after - before) for before, after in pairwise(edges)]
    return {
        "stages": {name: round(length, 2) for name, length in zip(STAGES, lengths, strict=True)},
        "cpu": watched.cpu(),
        "mebibytes": watched.mebibytes(),
        "ready": round(ready - began, 2),
        "load": round(os.getloadavg()[0], 2),
    }


def ways(earlier: Path | None) -> dict[str, tuple[Path, dict[str, str]]]:
    """What is compared: the checkout and the settings of each way."""
    here = Path(__file__).resolve().parents[1]
    if earlier:
        return {"earlier": (earlier, {}), "now": (here, {})}
    spawned = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return {"spawned": (here, spawned), "now": (here, {})}


def table(starts: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: seconds by stage and CPU seconds by process, median (lowest to highest)."""
    names = list(starts)
    lines = [f"| seconds | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]

    def row(title: str, *path: str) -> None:
        cells = []
        for name in names:
            values = [start[path[0]] if len(path) == 1 else start[path[0]][path[1]] for start in starts[name]]
            cells.append(f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")

    row("**ready**", "ready")
    for stage in STAGES:
        row(stage, "stages", stage)
    lines += ["", f"| CPU seconds | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for role in [*ROLES.values(), "others"]:
        row(role, "cpu", role)
    totals = [median([sum(start["cpu"].values()) for start in starts[name]]) for name in names]
    lines.append(f"| **all** | {' | '.join(f'{total:.1f}' for total in totals)} |")
    memory = [median([start["mebibytes"] for start in starts[name]]) for name in names]
    lines.append(f"| memory of all, MiB | {' | '.join(f'{size:.0f}' for size in memory)} |")
    return "\n".join(lines) + "\n"


def page(document: dict[str, Any]) -> str:
    """The whole page."""
    starts, machine = document["starts"], document["machine"]
    loads = [start["load"] for way in starts.values() for start in way]
    runs, first = min(map(len, starts.values())), next(iter(starts))
    text = f"""`python -m loadtests.startup`: {runs} warm starts each way, in turns, timed from the command to
        the line that announces the endpoint; the target is 25 s. {WAYS[first]} Median (lowest to highest).
        {document["cores"]} cores; load average {min(loads):.1f} to {max(loads):.1f} when a start was ready,
        the starts themselves included; Python {machine["python"]}, vLLM {machine["vllm"]}, commit
        {machine["commit"]}. Why it is so: [forked-processes](../decisions/forked-processes.md). Figures:
        [startup.json](startup.json)."""
    text = " ".join(text.split())
    text = textwrap.fill(text, 120, break_long_words=False)
    return f"# How long `make serve` takes\n\n{text}\n\n{table(starts)}"


@click.command(help=__doc__)
@click.option("--runs", default=5, show_default=True, help="starts of each way")
@click.option(
    "--earlier",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="a checkout of an earlier commit to compare with, in place of this one with spawned processes",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(runs: int, earlier: Path | None, out: Path) -> None:
    """Measure, and write JSON and page after every start."""
    from loadtests.bench import machine

    out.mkdir(parents=True, exist_ok=True)
    compared = ways(earlier)
    starts: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
    click.echo("  now: once, not counted", err=True)
    start(*compared["now"])  # from here on the files have been read
    for turn in range(runs):
        for name in list(compared)[:: 1 if turn % 2 == 0 else -1]:
            starts[name].append(start(*compared[name]))
            click.echo(f"  {name}: ready after {starts[name][-1]['ready']:.1f} s", err=True)
            if all(starts.values()):
                document = {"starts": starts, "cores": os.cpu_count(), "machine": machine()}
                (out / "startup.json").write_text(json.dumps(document, indent=1) + "\n")
                (out / "startup.md").write_text(page(document))
    click.echo(table(starts))


if __name__ == "__main__":
    main()
