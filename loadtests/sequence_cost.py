"""What it costs to score every token: prompts alone, and answers watched as they grow.

One engine for each kind of pooling; every batch runs in it in each way, the order rotating, and twice as
plain vLLM with everything of the guard taken out (``loadtests.switch``): the two over one another are the
control. ``prompt scoring`` scores all tokens and pools those of the prompt, ``monitoring`` pools the last
tokens of all sixteen growing answers in every step as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guard.bundle import Bundle
from guard.pooling import Pooling
from loadtests import grid, random_model
from loadtests.batches import batches, with_threshold
from loadtests.pairs import Child, Interval

MODEL = "12 × 768"
PROBE = 1200
"""Neurons that the probe reads."""
ROWS = 16
NEW_TOKENS = 24
LENGTH = (30, 120)
POOLINGS = {
    "ema": Pooling(kind="ema", rate=0.125, window=64),
    "attention": Pooling(kind="attention", heads=2, window=64),
}
TARGETS = {"prompt scoring": "≥ 0.98", "monitoring": "≥ 0.97"}
WAYS = {"plain": None, "control": None, "prompt scoring": False, "monitoring": True}
"""None: without the guard; else whether answers are watched."""
Seconds = dict[str, list[dict[str, float]]]


class WatchingChild(Child):
    """An engine whose answers may be watched."""

    module = "loadtests.patched_child"

    def batch(self, prompts: list[list[int]], max_tokens: int, watched: bool | None) -> dict[str, float]:
        """Timings of one batch; ``watched`` None is plain vLLM."""
        assert self._process.stdin is not None
        command = {
            "prompts": prompts,
            "max_tokens": max_tokens,
            "guard": watched is not None,
            "watched": bool(watched),
            "patches": None,
        }
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()


def make_bundle(folder: Path, model: Path, name: str) -> Path:
    """A bundle with a random probe of every token that passes everything."""
    config = grid.MODELS[MODEL]
    sites = grid.spread(PROBE, config["num_hidden_layers"], config["intermediate_size"], seed=1)
    (prompts,) = batches(1, 24, LENGTH, 256, seed=0)
    plain = random_model.make_bundle(folder / "last", model, sites, prompts)
    reference = random_model.Reference(model, sites)
    probed = random_model.with_sequence_probe(plain, reference, POOLINGS[name], prompts)
    return with_threshold(Bundle(probed.card, probed.probe), folder / name, 1.0)


def rotate(engine: WatchingChild, prompts: list[list[list[int]]]) -> Seconds:
    """Timings of each batch in each way; each way comes first as often as any other."""
    found: Seconds = {name: [] for name in WAYS}
    for turn, batch in enumerate(prompts):
        for step in range(len(WAYS)):
            name = list(WAYS)[(turn + step) % len(WAYS)]
            found[name].append(engine.batch(batch, NEW_TOKENS, WAYS[name]))
    return found


def ratios(found: Seconds) -> dict[str, dict[str, Any]]:
    """Each way against plain vLLM, batch by batch: throughput of whole batches, and time of their prefill."""

    def interval(name: str, clocks: tuple[str, ...], *, throughput: bool) -> dict[str, Any]:
        values = []
        for plain, other in zip(found["plain"], found[name], strict=True):
            a, b = (sum(run[clock] for clock in clocks) for run in (plain, other))
            values.append(a / b if throughput else b / a)
        return Interval.of(values)._asdict()

    return {
        name: {
            "throughput": interval(name, ("first", "decode"), throughput=True),
            "decode": interval(name, ("decode",), throughput=True),
            "prefill": interval(name, ("first",), throughput=False),
        }
        for name in found
        if name != "plain"
    }


def measure(folder: Path, logs: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Figures by kind of pooling and way. ``keep`` is called after each engine."""
    model = random_model.make_model(folder / "model", grid.MODELS[MODEL])
    result: dict[str, Any] = {"pooling": {}, "rounds": rounds}
    for name in POOLINGS:
        click.echo(f"  sequence probe: {name}", err=True)
        bundle = make_bundle(folder, model, name)
        engine = WatchingChild(model, bundle, grid.ENGINE, logs / f"sequence-{name}.log")
        try:
            engine.wait_ready()
            rotate(engine, batches(2, ROWS, LENGTH, 256, seed=20))
            result["pooling"][name] = ratios(rotate(engine, batches(rounds, ROWS, LENGTH, 256, seed=21)))
        finally:
            engine.close()
        keep(result)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown table of the figures."""
    lines = [
        "| median [95 % interval] | target | throughput / plain | decode / plain | prefill time / plain |",
        "|---|---|--:|--:|--:|",
    ]
    for pooling, ways in result["pooling"].items():
        for way, found in ways.items():
            title = "control: plain again" if way == "control" else way
            figures = (str(Interval(**found[name])) for name in ("throughput", "decode", "prefill"))
            lines.append(f"| {pooling}: {title} | {TARGETS.get(way, '')} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"
