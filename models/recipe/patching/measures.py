"""Figures out of answers and likelihoods, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guard.locate import causal
from guard.locate.causal import causal_effect
from guard.stats import wilson
from models.recipe.locate.effects import interval
from models.recipe.patching.study import Lab
from models.recipe.patching.ways import Way, answers, chosen, likelihoods

RECIPIENT, DONOR = Way("recipient"), Way("donor")
BENIGN = ("benign", "hard")


def rate(costs: Sequence[int], *, of: int) -> dict[str, float]:
    """Share of prompts whose cost is ``of``, with its Wilson interval: 1 answered, 0 refused."""
    return wilson(sum(cost == of for cost in costs), len(costs)).document()


def safety(lab: Lab, way: Way) -> dict[str, Any]:
    """Share of harmful prompts that are answered, and the causal effect C of the patch."""
    costs = [np.array(answers(lab, each, "harmful"), dtype=np.float64) for each in (RECIPIENT, DONOR, way)]
    effect = causal_effect(*costs)
    return {
        "unsafe": rate(answers(lab, way, "harmful"), of=1),
        "effect": {key: effect.document()[key] for key in ("value", "low", "high")},
    }


def refusals(lab: Lab, way: Way) -> dict[str, Any]:
    """Share of benign prompts that are refused, by role."""
    return {role: rate(answers(lab, way, role), of=0) for role in BENIGN}


def ability(lab: Lab, way: Way) -> dict[str, Any]:
    """What becomes of answers to benign requests under the model: nats a token and perplexity.

    ``first`` is the change of the first token's log-probability, where the lab models decide to refuse, and
    ``rest`` that of the others', nats a token.
    """
    found = {}
    for which in ("real", "own"):
        before, after = (np.array(likelihoods(lab, each, which)) for each in (RECIPIENT, way))
        length = np.array([len(answer) for _, answer in lab.texts[which]])
        long = length > 1
        found[which] = {
            "perplexity": float(np.exp(-after.sum() / length.sum())),
            "change": interval((after - before).sum(1) / length),
            "first": interval((after - before)[:, 0]),
            "rest": interval((after - before)[long, 1] / (length[long] - 1)),
        }
    return found


def controls(lab: Lab, way: Way) -> dict[str, Any]:
    """The same with other units: random ones of the same layers, and the next window of the ranking."""
    names = [f"random {draw}" for draw in range(lab.size.draws)]
    each = {name: safety(lab, way.instead(name)) for name in (*names, "window")}
    ours = np.array(answers(lab, way, "harmful"), dtype=np.float64)
    theirs = [np.array(answers(lab, way.instead(name), "harmful"), dtype=np.float64) for name in names]
    against = causal.against(ours, theirs)
    return {"each": each, "difference": against.difference, "p": against.p}


def units(lab: Lab, way: Way) -> dict[str, Any]:
    """How many units there are, and in which layers."""
    found = chosen(lab, way)
    return {"units": len(found), "layers": found.selected["mlp"].sum(1).tolist()}
