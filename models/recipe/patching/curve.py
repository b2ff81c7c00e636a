"""All figures of one pair: what is chosen on dev prompts, and what the choice does on test prompts."""

from __future__ import annotations

from typing import Any

from models.recipe.patching import choice, measures
from models.recipe.patching.choice import SHARE
from models.recipe.patching.positions import Reach
from models.recipe.patching.rankings import PAPER
from models.recipe.patching.study import Lab
from models.recipe.patching.ways import Way

REACHES: tuple[Reach, ...] = ("all", "prompt", "last", "answer")
CONTROLLED = (0.01, SHARE, 0.2)
"""Shares at which other units are tried; stored patches and the paper's ranking at 5 % alone."""
Document = dict[str, Any]


def figures(lab: Lab) -> Document:
    """Everything about a pair."""
    ranked = choice.rankings(lab)
    best = ranked["best"]
    kept = choice.stored(lab, best)
    kind, ranking, of = kept["each"][kept["best"]]["way"]
    ends = {
        name: _end(lab, way) for name, way in (("recipient", measures.RECIPIENT), ("donor", measures.DONOR))
    }
    rows = {name: Way("dynamic", name, SHARE) for name in dict.fromkeys((best, PAPER))}
    return {
        "about": lab.pair.about,
        "weights": lab.checkpoint.weights_sha256,
        "dev": {"rankings": ranked, "stored": kept, "layers": choice.layers(lab)},
        "ends": ends,
        "dynamic": {name: _curve(lab, way, whole=name == best) for name, way in rows.items()},
        "stored": {
            "way": [kind, ranking, of],
            "curve": _curve(lab, Way(kind, ranking, SHARE, of=of), whole=True),
        },
        "reach": {reach: measures.safety(lab, Way("dynamic", best, SHARE, reach=reach)) for reach in REACHES},
    }


def _end(lab: Lab, way: Way) -> Document:
    return {
        **measures.safety(lab, way),
        "benign": measures.refusals(lab, way),
        "ability": measures.ability(lab, way),
    }


def _curve(lab: Lab, at_share: Way, *, whole: bool) -> list[Document]:
    """One row a share of the neurons; ``whole``: benign prompts are asked for each, else for 5 % alone."""
    rows = []
    for share in lab.size.shares:
        way = at_share._replace(share=share)
        row = {"share": share, **measures.units(lab, way), **measures.safety(lab, way)}
        if whole or share == SHARE:
            row |= {"benign": measures.refusals(lab, way), "ability": measures.ability(lab, way)}
        if share == SHARE or (whole and way.kind == "dynamic" and share in CONTROLLED):
            row |= {"controls": measures.controls(lab, way)}
        rows.append(row)
    return rows
