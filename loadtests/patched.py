"""What patches cost: decoding with all rows patched, with none, with one in sixteen, and the second prefill.

One engine holds a stored patch, another also runs a donor under an (IA)³ vector. Every batch runs in its
engine in each of several ways, the order rotating (``loadtests.switch`` takes the guard out for plain vLLM),
and twice as plain vLLM: the two over one another are the control. Patched are five per cent of the neurons
of all layers but the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from guard import patch as patches
from guard.bundle import Bundle
from guard.patch import Patch
from guard.patch_card import PatchSite
from loadtests import grid, random_model
from loadtests.batches import batches, with_threshold
from loadtests.pairs import Child, Interval

MODEL = "12 × 768"
PROBE = 1200
"""Neurons that the probe reads."""
SHARE = 0.05
ROWS = 16
NEW_TOKENS = 24
WAYS: dict[str, dict[str, tuple[str | None, int]]] = {
    "stored": {"none active": (None, 0), "stored, all rows": ("stored", ROWS)},
    "dynamic": {
        "none active, donor loaded": (None, 0),
        "dynamic, one row in sixteen": ("dynamic", 1),
        "dynamic, all rows": ("dynamic", ROWS),
    },
}
"""By engine: what runs beside plain vLLM, by the patch and how many rows run under it."""
TARGETS = {"none active": "≥ 0.98", "stored, all rows": "≥ 0.95"}
Seconds = dict[str, list[dict[str, float]]]


class PatchedChild(Child):
    """An engine whose requests may be patched."""

    module = "loadtests.patched_child"

    def patched(
        self, prompts: list[list[int]], max_tokens: int, names: list[str | None] | None
    ) -> dict[str, float]:
        """Timings of one batch; ``names`` None is plain vLLM."""
        assert self._process.stdin is not None
        command = {"prompts": prompts, "max_tokens": max_tokens, "guard": names is not None, "patches": names}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()


def bundles(folder: Path, model: Path) -> dict[str, Path]:
    """A bundle that passes everything with a stored patch, and one with a dynamic patch."""
    config = grid.MODELS[MODEL]
    layers, width = config["num_hidden_layers"], config["intermediate_size"]
    (fitting,) = batches(1, 24, grid.LENGTH, 256, seed=0)
    plain = random_model.make_bundle(
        folder / "probe", model, grid.spread(PROBE, layers, width, seed=1), fitting
    )
    passing = Bundle.load(with_threshold(plain, folder / "pass", 1.0))
    shape = passing.card.model.shape
    chosen = grid.spread(round(SHARE * (layers - 1) * width), layers - 1, width, seed=2)
    sites = [PatchSite(**site.model_dump()) for site in chosen]
    vector = np.random.default_rng(3).uniform(0.9, 1.1, (layers, width)).astype(np.float32)
    made: dict[str, Patch] = {
        "stored": patches.stored("stored", sites, shape, scale=0.9),
        "dynamic": patches.from_vector("dynamic", sites, vector, shape),
    }
    return {name: passing.with_patch(patch).save(folder / name) for name, patch in made.items()}


def rotate(
    engine: PatchedChild, prompts: list[list[list[int]]], new_tokens: int, ways: dict[str, Any]
) -> Seconds:
    """Timings of each batch in each way; each way comes first as often as any other."""
    asked = {"plain": None, "control": None, **ways}
    found: Seconds = {name: [] for name in asked}
    for turn, batch in enumerate(prompts):
        for step in range(len(asked)):
            name = list(asked)[(turn + step) % len(asked)]
            found[name].append(engine.patched(batch, new_tokens, _names(asked[name], len(batch))))
    return found


def _names(way: tuple[str | None, int] | None, rows: int) -> list[str | None] | None:
    """The patch of each row: the first ones are patched."""
    if way is None:
        return None
    patch, count = way
    return [patch if row < count else None for row in range(rows)]


def ratios(found: Seconds, clock: str, *, throughput: bool) -> dict[str, Any]:
    """Each way against plain vLLM, batch by batch: throughput, or seconds."""

    def interval(name: str) -> dict[str, Any]:
        pairs = zip(found["plain"], found[name], strict=True)
        values = [a[clock] / b[clock] if throughput else b[clock] / a[clock] for a, b in pairs]
        return Interval.of(values)._asdict()

    return {name: interval(name) for name in found if name != "plain"}


def measure(folder: Path, logs: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """``decode`` and ``first``: intervals by engine and way. ``keep`` is called after each engine."""
    model = random_model.make_model(folder / "model", grid.MODELS[MODEL])
    found: dict[str, Any] = {"decode": {}, "first": {}, "milliseconds": {}, "rounds": rounds}
    for name, bundle in bundles(folder, model).items():
        click.echo(f"  patches: {name}", err=True)
        engine = PatchedChild(model, bundle, grid.ENGINE, logs / f"patches-{name}.log")
        try:
            engine.wait_ready()
            ways = WAYS[name]
            rotate(engine, batches(2, ROWS, grid.LENGTH, 256, seed=10), NEW_TOKENS, ways)
            decoded = rotate(engine, batches(rounds, ROWS, grid.LENGTH, 256, seed=11), NEW_TOKENS, ways)
            single = {way: each for way, each in ways.items() if each[0] is None or "all" in way}
            alone = rotate(engine, batches(2 * rounds, 1, (60, 120), 256, seed=12), 1, single)
        finally:
            engine.close()
        found["decode"][name] = ratios(decoded, "decode", throughput=True)
        found["first"][name] = ratios(alone, "first", throughput=False)
        found["milliseconds"][name] = float(np.median([1e3 * run["first"] for run in alone["plain"]]))
        keep(found)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown table of the figures."""
    lines = ["| median [95 % interval] | target | decode throughput / plain | time to first token / plain |"]
    lines += ["|---|---|--:|--:|"]
    for engine, decoded in found["decode"].items():
        for way, interval in decoded.items():
            first = found["first"][engine].get(way)
            title = "control: plain again" if way == "control" else way
            shown = str(Interval(**first)) if first else ""
            where = f"engine with a {engine} patch"
            cells = (f"{where}: {title}", TARGETS.get(way, ""), str(Interval(**interval)), shown)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
