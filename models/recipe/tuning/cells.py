"""The cells of the study: which model is tuned how, on what, with which units. One cell is one training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from guard.checkpoint import Checkpoint
from guard.tune.methods import METHODS, Method
from guard.tune.options import TuneOptions
from guard.tune.run import Record, tune
from models.recipe.tuning.material import ALIGNED, SFT, Material

RATES: dict[str, float] = {
    "full": 5e-4,
    "sn": 2e-3,
    "budget": 2e-3,
    "ia3": 0.03,
    "lora": 5e-3,
    "downstream": 1e-3,
}
"""The papers' rates are for models a thousand times larger; these were chosen on dev prompts."""


CONTROLLED = ("sn importance", "sn scu", "down rsn robust", "down freeze scu")
"""What random units are tried for: sets of few units. Of a set that holds most units, one is like another."""


def rate_of(cell: Cell) -> float:
    """Of a method, or of whatever is tuned downstream: protected and not, all alike."""
    return RATES["downstream" if cell.rows == "downstream" else cell.method]


class Cell(NamedTuple):
    """One training."""

    name: str
    start: str
    """A lab model, or the name of the cell that is tuned on."""
    method: Method
    rows: str
    units: str | None = None
    seed: int | None = None
    """Of random units in place of those; None: the located ones."""


def cells(draws: int) -> list[Cell]:
    """All cells, those that others start from first."""
    safer = [
        Cell("full", SFT, "full", "safety"),
        Cell("sn importance", SFT, "sn", "safety", "importance"),
        Cell("sn robust", SFT, "sn", "safety", "robust"),
        Cell("sn scu", SFT, "sn", "safety", "scu"),
        Cell("budget ru", SFT, "budget", "safety", "ru"),
        Cell("ia3", SFT, "ia3", "safety"),
        Cell("lora", SFT, "lora", "safety"),
    ]
    kept = [
        Cell("down full", ALIGNED, "full", "downstream"),
        Cell("down rsn robust", ALIGNED, "rsn", "downstream", "robust"),
        Cell("down freeze scu", ALIGNED, "freeze", "downstream", "scu"),
        Cell("down freeze scu+cu", ALIGNED, "freeze", "downstream", "scu+cu"),
    ]
    after = [
        Cell(f"{name}, then down", name, "full", "downstream")
        for name in ("full", "sn importance", "sn robust")
    ]
    random = [
        cell._replace(name=f"{cell.name} random {seed}", seed=seed)
        for seed in range(draws)
        for cell in (*safer, *kept)
        if cell.name in CONTROLLED
    ]
    alone = [Cell("sn importance, refusals alone", SFT, "sn", "refusals", "importance")]
    return [*safer, *kept, *random[: len(CONTROLLED)], *after, *alone, *random[len(CONTROLLED) :]]


def options_of(cell: Cell, material: Material) -> TuneOptions:
    """How a cell is trained; the same steps, batch and seed for all."""
    size = material.size
    settings: dict[str, Any] = {
        "steps": size.steps,
        "batch": size.batch,
        "rate": rate_of(cell),
        "own_answers": size.own_tokens,
        "schedule": "plateau",
        "warmup": 0.1,
        "longest": 64,
        "dtype": "bfloat16",
        # In the lab models the first token of an answer decides whether it is a refusal.
        "first_token": 1.0 if cell.rows == "downstream" else 4.0,
    }
    if cell.method in ("ia3", "lora"):
        settings["whole"] = True
    return METHODS[cell.method].options(**settings)


def trained(cell: Cell, material: Material, every: dict[str, Cell]) -> Record:
    """The record of a cell, trained now if its checkpoint is not there."""
    out = folder(cell, material)
    if not out.is_dir():
        print("training:", cell.name, flush=True)
        start = every.get(cell.start)
        base = Checkpoint.open(folder(start, material)) if start else material.start(cell.start)
        units = [material.units(cell.start, cell.units, cell.seed)] if cell.units else []
        tune(
            cell.method,
            base,
            [material.rows(cell.rows)],
            options_of(cell, material),
            out,
            units=units,
            store=material.root / "going",
        )
    record: Record = json.loads((out / "tune.json").read_text("utf-8"))
    return record


def folder(cell: Cell, material: Material) -> Path:
    """Where the checkpoint of a cell is."""
    return material.root / "cells" / cell.name.replace(" ", "-").replace(",", "")
