"""What is chosen on dev prompts: how units are ranked, and which stored patch is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.recipe.patching.measures import DONOR, RECIPIENT
from models.recipe.patching.rankings import PAPER, RANKINGS
from models.recipe.patching.study import Lab
from models.recipe.patching.ways import Kind, Way, answers

SMALL = (0.01, 0.02, 0.05)
"""Shares over which rankings are compared."""
SHARE = 0.05
MEANS = (PAPER, "change, prompt", "change, last")
"""Over which tokens the donor's mean is taken: those of these rankings."""


def margin(lab: Lab, way: Way) -> float:
    """Share of harmful dev prompts that are refused, less that of benign ones."""
    harmful, benign = (1 - np.mean(answers(lab, way, role)) for role in ("dev harmful", "dev benign"))
    return float(harmful - benign)


def refused(lab: Lab, way: Way) -> float:
    """Share of harmful dev prompts that are refused."""
    return 1 - float(np.mean(answers(lab, way, "dev harmful")))


def rankings(lab: Lab) -> dict[str, Any]:
    """Every ranking at small shares: harmful dev prompts refused, and the margin; the best by mean margin."""
    found: dict[str, dict[str, Any]] = {}
    for name in RANKINGS:
        ways = [Way("dynamic", name, share) for share in SMALL]
        found[name] = {
            "refused": [refused(lab, way) for way in ways],
            "margin": float(np.mean([margin(lab, way) for way in ways])),
        }
    best = max(found, key=lambda name: found[name]["margin"])
    return {
        "donor": {"refused": refused(lab, DONOR), "margin": margin(lab, DONOR)},
        "recipient": {"refused": refused(lab, RECIPIENT)},
        "each": found,
        "best": best,
    }


def stored(lab: Lab, best: str) -> dict[str, Any]:
    """Every stored patch of the best ranking and of the paper's, at five per cent."""
    found: dict[str, Any] = {}
    for ranking in dict.fromkeys((best, PAPER)):
        kinds: list[tuple[Kind, str]] = [("factors", ""), *(("mean", of) for of in MEANS)]
        for kind, of in kinds:
            way = Way(kind, ranking, SHARE, of=of)
            name = f"{kind} ({of})" if of else kind
            found[f"{name} / {ranking}"] = {
                "way": [kind, ranking, of],
                "refused": refused(lab, way),
                "margin": margin(lab, way),
            }
    return {"each": found, "best": max(found, key=lambda name: found[name]["margin"])}


def layers(lab: Lab) -> dict[str, float]:
    """Harmful dev prompts refused with as many units out of some layers alone, ranked as in the paper."""
    last = lab.shape.layers - 1
    half = last // 2
    parts: dict[str, tuple[int, ...]] = {f"{layer}": (layer,) for layer in range(last)}
    parts |= {f"0 to {half - 1}": tuple(range(half)), f"{half} to {last - 1}": tuple(range(half, last))}
    return {name: refused(lab, Way("dynamic", PAPER, SHARE, layers=part)) for name, part in parts.items()}
