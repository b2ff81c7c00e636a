"""What it costs to score every token: prompts alone, and answers watched as they grow.

One engine for each kind of pooling, whose guard is turned off and on between two steps
(``loadtests.stepwise_child``). ``prompt scoring`` scores all tokens and pools those of the prompt,
``monitoring`` pools the last tokens of all sixteen growing answers in every step as well. Ratios of
neighbouring steps are measured for prefill and for decoding. The throughput of a batch follows from them:
sixteen prompts are read, and twenty-three more tokens made for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

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
TOGETHER = 2
"""Prompts that a timed step of prefill reads; in the batch all sixteen are read in one."""
CYCLES = 40
"""Of each decoded batch: a cycle is one step in each way."""
POOLINGS = {
    "ema": Pooling(kind="ema", rate=0.125, window=64),
    "attention": Pooling(kind="attention", heads=2, window=64),
}
TARGETS = {"prompt scoring": "≥ 0.98", "monitoring": "≥ 0.97"}
Steps = dict[str, list[float]]


class StepwiseChild(Child):
    """An engine whose guard is turned off and on between steps."""

    module = "loadtests.stepwise_child"

    def steps(self, what: str, prompts: list[list[int]], cycles: int, *, watched: bool) -> Steps:
        """Seconds of single steps, by way."""
        assert self._process.stdin is not None
        command = {"what": what, "prompts": prompts, "cycles": cycles, "watched": watched}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return cast("Steps", self._answer())


def make_bundle(folder: Path, model: Path, name: str) -> Path:
    """A bundle with a random probe of every token that passes everything."""
    config = grid.MODELS[MODEL]
    sites = grid.spread(PROBE, config["num_hidden_layers"], config["intermediate_size"], seed=1)
    (prompts,) = batches(1, 24, LENGTH, 256, seed=0)
    plain = random_model.make_bundle(folder / "last", model, sites, prompts)
    reference = random_model.Reference(model, sites)
    probed = random_model.with_sequence_probe(plain, reference, POOLINGS[name], prompts)
    return with_threshold(Bundle(probed.card, probed.probe), folder / name, 1.0)


def measure_way(engine: StepwiseChild, pairs: int, *, watched: bool) -> dict[str, Steps]:
    """Neighbouring steps: of prefill five times ``pairs``, of decoding twenty times as many."""
    (prompts,) = batches(1, 5 * pairs * TOGETHER, LENGTH, 256, seed=21)
    found = {"prefill": engine.steps("prefill", prompts, 5 * pairs, watched=watched)}
    decoded: Steps = {}
    for batch in batches(max(1, 20 * pairs // CYCLES), ROWS, LENGTH, 256, seed=22):
        for way, seconds in engine.steps("decode", batch, CYCLES, watched=watched).items():
            decoded.setdefault(way, []).extend(seconds)
    return {**found, "decode": decoded}


def figures(found: dict[str, Steps], way: str) -> dict[str, Any]:
    """``way`` against plain vLLM: time of prefill and of a decode step, and throughput of a batch of both."""
    plain = {what: float(np.median(steps["plain"])) for what, steps in found.items()}
    reading = plain["prefill"] * ROWS / TOGETHER
    making = plain["decode"] * (NEW_TOKENS - 1)

    def throughput(prefill: NDArray[Any], decode: NDArray[Any], axis: int = -1) -> Any:
        slower = reading * np.median(prefill, axis) + making * np.median(decode, axis)
        return (reading + making) / slower

    ratios = {what: np.divide(steps[way], steps["plain"]) for what, steps in found.items()}
    return {
        "throughput": _interval(throughput, (ratios["prefill"], ratios["decode"])),
        "decode": Interval.of(ratios["decode"].tolist())._asdict(),
        "prefill": Interval.of(ratios["prefill"].tolist())._asdict(),
        "plain_ms": {what: 1e3 * seconds for what, seconds in plain.items()},
    }


def _interval(statistic: Callable[..., Any], samples: Sequence[NDArray[Any]]) -> dict[str, Any]:
    low, high = bootstrap(
        samples, statistic, n_resamples=5000, method="percentile", random_state=0, vectorized=True
    ).confidence_interval
    value, count = float(statistic(*samples)), min(map(len, samples))
    return Interval(value, float(low), float(high), count)._asdict()


def measure(folder: Path, logs: Path, pairs: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Figures by kind of pooling and way. ``keep`` is called after each engine."""
    model = random_model.make_model(folder / "model", grid.MODELS[MODEL])
    result: dict[str, Any] = {"pooling": {}, "pairs": pairs}
    for name in POOLINGS:
        bundle = make_bundle(folder, model, name)
        engine = StepwiseChild(model, bundle, grid.ENGINE, logs / f"sequence-{name}.log")
        found = result["pooling"][name] = {}
        try:
            engine.wait_ready()
            measure_way(engine, 1, watched=True)
            for way, watched in (("prompt scoring", False), ("monitoring", True)):
                click.echo(f"  sequence probe: {name}, {way}", err=True)
                steps = measure_way(engine, pairs, watched=watched)
                found[way] = figures(steps, "guarded")
                found[f"{way}, control"] = figures(steps, "control")
        finally:
            engine.close()
        keep(result)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown table of the figures."""
    lines = [
        "| median [95 % interval] | target | throughput / plain | decode step / plain | prefill / plain |",
        "|---|---|--:|--:|--:|",
    ]
    for pooling, ways in result["pooling"].items():
        for way, found in ways.items():
            values = (str(Interval(**found[name])) for name in ("throughput", "decode", "prefill"))
            lines.append(f"| {pooling}: {way} | {TARGETS.get(way, '')} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"
