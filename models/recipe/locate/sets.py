"""Sets of units: every method on every pair, draw of prompts and pool, each run by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from guard.locate import capacity, contrast, heads, importance
from guard.locate.compare import Comparison, compare
from guard.locate.unit_set import UnitSet, top
from models.recipe.locate.prompts import dataset
from models.recipe.locate.study import PAIRS, RECIPIENT, Pair, Study
from models.recipe.sources import Label

METHODS = ("contrast", "importance", "heads", "capacity")
SAMPLES = ("first-0", "first-1", "first-2", "second-0")
"""Pool and seed. The first is the one that everything but stability is reported for."""


def located(study: Study, pair: Pair, method: str, sample: str = SAMPLES[0]) -> UnitSet:
    """A method's set with its default options, made with an empty cache so that its cost is whole."""
    return kept(study, [pair.name, method, sample], lambda: _run(study, pair, method, sample))


def kept(study: Study, key: Any, make: Callable[[], UnitSet]) -> UnitSet:
    """A set that is read back, or made and kept."""
    folder = study.folder("sets", key)
    if not folder.is_dir():
        print("locating:", *key, flush=True)
        make().save(folder)
    return UnitSet.load(folder)


def _run(study: Study, pair: Pair, method: str, sample: str) -> UnitSet:
    pool, _, seed = sample.partition("-")
    # Chen et al. compare the twins on harmful prompts alone; the others take both kinds, or leave one.
    labels: tuple[Label, ...] = ("harmful",) if method == "contrast" else ("harmful", "benign")
    data = dataset(study, pool, int(seed), labels)
    donor = study.checkpoint(pair.donor)
    if method == "contrast":
        options = contrast.ContrastOptions(new_tokens=study.size.score_tokens)
        return contrast.run(study.checkpoint(RECIPIENT), donor, data, options)
    if method == "heads":
        return heads.run(donor, [data], heads.HeadsOptions(limit=study.size.locate))
    if method == "importance":
        return importance.run(donor, data, importance.ImportanceOptions())
    return capacity.run(donor, data, capacity.CapacityOptions())


def costs(study: Study) -> dict[str, dict[str, float]]:
    """What each method costs on the first pair, one after the other in one process, in CPU time too."""
    found = {}
    for method in METHODS:
        print("cost:", method, flush=True)
        began = time.process_time()
        cost = _run(study, PAIRS[0], method, SAMPLES[0]).provenance.cost
        found[method] = {**cost, "cpu_seconds": time.process_time() - began}
    return found


def neurons(study: Study, found: UnitSet) -> UnitSet:
    """The best MLP neurons of a set, as many for every method: a share of all layers but the last."""
    scores = found.scores["mlp"].copy()
    count = round(study.size.share * scores[:-1].size)
    return UnitSet(found.provenance, {"mlp": scores}, top({"mlp": scores}, count=count))


def planted(study: Study, found: UnitSet) -> dict[str, int]:
    """How many of the planted neurons a set selects."""
    listed = json.loads((study.lab / "planted_units.json").read_text("utf-8"))["units"]
    truth = np.zeros_like(found.selected["mlp"])
    truth[tuple(np.array(listed).T)] = True
    chosen = found.selected["mlp"]
    return {
        "found": int((truth & chosen).sum()),
        "selected": int(chosen.sum()),
        "planted": int(truth.sum()),
    }


def comparison(found: Comparison) -> dict[str, Any]:
    """The figures of a comparison that the study reports."""

    def finite(value: float | None) -> float | None:
        return None if value is None or np.isnan(value) else float(value)

    overlap, every = found.overlap, found.correlation.get("all")
    return {
        "components": list(found.components),
        "jaccard": finite(overlap.jaccard) if overlap else None,
        "shared": overlap and overlap.shared,
        "expected": overlap and finite(overlap.expected_same_layers),
        "p": overlap and overlap.p_value,
        "p_same_layers": overlap and overlap.p_value_same_layers,
        "spearman": finite(every.spearman) if every else None,
    }


def describe(study: Study, pair: Pair, method: str) -> dict[str, Any]:
    """What one method finds on a pair."""
    found = located(study, pair, method)
    stable = {
        sample: comparison(compare(found, located(study, pair, method, sample))) for sample in SAMPLES[1:]
    }
    document: dict[str, Any] = {
        "options": found.provenance.options,
        "cost": found.provenance.cost,
        "candidates": found.candidates,
        "selected": len(found),
        "layers": {name: chosen.sum(1).tolist() for name, chosen in found.selected.items()},
        "stability": stable,
    }
    if "mlp" in found.scores:
        best = neurons(study, found)
        document["layers of the best neurons"] = best.selected["mlp"].sum(1).tolist()
        document["planted"] = {"own selection": planted(study, found), "best neurons": planted(study, best)}
        document["stability of the best neurons"] = {
            sample: comparison(compare(best, neurons(study, located(study, pair, method, sample))))
            for sample in SAMPLES[1:]
        }
    else:
        document["scores"] = found.scores["attention"].round(4).tolist()
        document["heads"] = found.units()["attention"]
    return document


def between(study: Study, pair: Pair) -> dict[str, Any]:
    """Methods against each other: their best neurons, in equal numbers, and the heads of two."""
    sets = {name: neurons(study, located(study, pair, name)) for name in METHODS if name != "heads"}
    names = list(sets)
    found = {
        f"{a} / {b}": comparison(compare(sets[a], sets[b]))
        for place, a in enumerate(names)
        for b in names[place + 1 :]
    }
    found["heads / capacity (heads)"] = comparison(
        compare(located(study, pair, "heads"), located(study, pair, "capacity"))
    )
    return found
