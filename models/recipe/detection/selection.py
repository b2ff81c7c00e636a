"""Do chosen units beat random ones? The answer as a curve over how many there are.

Neurons are chosen by an L1 fit on the fit prompts; random ones come from the same layers in the same numbers.
Both are fitted and tested alike, and differences are taken on the same resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.figures import Scored, ranking
from guard.fitting import Role
from guard.leave_out import choose_strength
from guard.paired import differences
from guard.probe import BoolArray, fit_probe
from guard.resample import requests_of
from guard.select import select_l1
from guard.units import columns_within, every_unit, from_columns, random_like, read_units
from models.recipe.detection.study import APART, VARIANTS, Study

Figures = dict[str, Any]
COUNTS = (4, 8, 16, 32, 64, 128, 256, 1024)
DRAWS = 5


def curve(study: Study) -> dict[str, Any]:
    """By number of neurons: chosen, random draws, differences; and the planted and all neurons."""
    variant = VARIANTS[0]
    shape = study.subject(variant).checkpoint.shape
    units, every = every_unit(shape, ("mlp",)), study.units(variant)
    neurons = columns_within(units, every, shape)
    fit = _only(study.role(variant, study.fitted_on(variant, study.plain), every), neurons)
    test = _only(study.role(variant, study.evaluate, every), neurons)
    pool: BoolArray = test.seen.harmful | ~np.isin(test.seen.sources, APART)
    about = Scored(np.zeros(len(pool)), test.seen.harmful, test.seen.sources, requests_of(test.seen.prompts))[
        pool
    ]

    def scores(columns: Any) -> tuple[Any, float]:
        """Of the pool, and the strength that leaving sources out chose."""
        seen, features = fit.seen, fit.features[:, columns]
        strength = choose_strength(features, seen.harmful, seen.sources, seen.harmful).strength
        probe = fit_probe(features, seen.harmful, strength=strength)
        return probe.logits(test.features[pool][:, columns]), strength

    def figures(found: Any) -> dict[str, Any]:
        return ranking(Scored(found, about.positive, about.sources, about.requests), study.bootstrap)

    rows: dict[str, Any] = {}
    sets = {
        f"{k} neurons": from_columns(select_l1(fit.features, fit.seen.harmful, k), units, shape)
        for k in COUNTS
    }
    sets["planted neurons"] = read_units(study.lab / "planted_units.json", shape)
    for name, chosen in sets.items():
        print(f"selection: {name}", flush=True)
        columns = columns_within(chosen, units, shape)
        found, strength = scores(columns)
        row: dict[str, Any] = {
            "n": len(columns),
            "strength": strength,
            "chosen": figures(found),
            "random": [],
        }
        for draw in range(DRAWS):
            control, _ = scores(columns_within(random_like(chosen, shape, seed=draw), units, shape))
            scored = Scored(control, about.positive, about.sources, about.requests)
            row["random"].append(
                {**figures(control), "chosen_minus_random": differences(scored, found, study.bootstrap)}
            )
        rows[name] = row
    found, strength = scores(np.arange(fit.features.shape[1]))
    rows["all neurons"] = {
        "n": fit.features.shape[1],
        "strength": strength,
        "chosen": figures(found),
        "random": [],
    }
    return rows


def _only(role: Role, columns: Any) -> Role:
    return Role(role.seen, role.features[:, columns])
