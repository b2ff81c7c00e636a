"""The alignment tax: which neurons safety and helpfulness share, and what patching those does to both.

After Chen et al. (arXiv 2406.14144, section 5): units are chosen on one pool of prompts as the intersection
of the safety twin's and the helpful twin's top sets, and patched from each twin into the other.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from guard.locate import contrast
from guard.locate.causal import refusal_cost
from guard.locate.change import Text
from guard.locate.compare import compare
from guard.locate.controls import random_like
from guard.locate.patching import units_of
from guard.locate.sweep import log_probabilities, sweep
from guard.locate.tax import cross_patch
from guard.locate.twins import Twin
from guard.locate.unit_set import UnitSet
from guard.prompts import Tokens
from guard.units import Units
from models.recipe.locate import helpful
from models.recipe.locate.effects import BATCH, interval
from models.recipe.locate.prompts import dataset, tokens
from models.recipe.locate.sets import comparison, kept, located
from models.recipe.locate.study import RECIPIENT, Pair, Study

LOCATING = "second-0"
"""The pool whose units are patched; the helpful twin is trained on rows of both."""
VECTORS = {"planted": "ia3-planted.safetensors", "dense": "ia3-dense.safetensors"}
TEXTS = 150


def helpful_set(study: Study, sample: str) -> UnitSet:
    """Change scores between the unaligned model and the helpful twin on benign prompts."""

    def make() -> UnitSet:
        pool, _, seed = sample.partition("-")
        options = contrast.ContrastOptions(new_tokens=study.size.score_tokens)
        data = dataset(study, pool, int(seed), ("benign",))
        return contrast.run(study.checkpoint(RECIPIENT), helpful.helpful(study), data, options)

    return kept(study, ["helpful", sample], make)


def overlaps(study: Study, pair: Pair) -> dict[str, Any]:
    """Safety and helpfulness sets of both pools, each against each."""
    sets = {}
    for sample in ("first-0", LOCATING):
        pool = sample.partition("-")[0]
        sets[f"safety, {pool} pool"] = located(study, pair, "contrast", sample)
        sets[f"helpfulness, {pool} pool"] = helpful_set(study, sample)
    return {f"{a} / {b}": comparison(compare(sets[a], sets[b])) for a, b in combinations(sets, 2)}


def shared(study: Study, pair: Pair) -> UnitSet:
    """The units that both sets of the locating pool select."""
    safety = located(study, pair, "contrast", LOCATING)
    both = safety.selected["mlp"] & helpful_set(study, LOCATING).selected["mlp"]
    return UnitSet(safety.provenance, dict(safety.scores), {"mlp": both})


def crossed(study: Study, pair: Pair) -> dict[str, Any]:
    """Patch the shared units, and as many random ones of the same layers, both ways."""
    found = shared(study, pair)
    if not len(found):
        return {"units": 0}
    base = study.checkpoint(RECIPIENT)
    model, shape = base.load_model(), base.shape
    safety = Twin(model, helpful.factors(study.lab / VECTORS[pair.name]))
    useful = Twin(model, helpful.vector(study))
    harmful, benign = tokens(study, "harmful"), tokens(study, "benign")
    cost = refusal_cost(base.load_tokenizer())
    sets = {"shared": found, **{f"random {seed}": random_like(found, seed=seed) for seed in range(2)}}
    document: dict[str, Any] = {"units": len(found), "prompts": len(harmful), "texts": TEXTS, "sets": {}}
    for name, chosen in sets.items():
        units = units_of(chosen, shape)
        document["sets"][name] = _both(safety, useful, units, harmful, benign, cost, study)
    texts = helpful.texts(study.data, study.lab, TEXTS)
    every = [(), *(units_of(chosen, shape) for chosen in sets.values())]
    document["reference answers"] = {
        "into safety": _likelihoods(safety, useful, every, texts, list(sets)),
        "into helpful": _likelihoods(useful, safety, every, texts, list(sets)),
    }
    return document


def _both(
    safety: Twin,
    useful: Twin,
    units: Units,
    harmful: list[Tokens],
    benign: list[Tokens],
    cost: Any,
    study: Study,
) -> dict[str, Any]:
    """Share of prompts that are answered, not refused, before and after, both ways."""
    settings: dict[str, Any] = {"new_tokens": study.size.new_tokens, "batch_tokens": BATCH}
    found: dict[str, Any] = {}
    for name, prompts in (("harmful", harmful), ("benign", benign)):
        result = cross_patch(safety, useful, units, prompts, {"answered": cost}, **settings)
        found[name] = {
            "into safety": result.into_first["answered"]._asdict(),
            "into helpful": result.into_second["answered"]._asdict(),
        }
    return found


def _likelihoods(
    recipient: Twin, donor: Twin, sets: list[Units], texts: list[Text], names: list[str]
) -> dict[str, Any]:
    """Log-probability of the sources' answers, nats a token: before, and by how much each patch raises it."""
    lengths = np.array([len(answer) for _, answer in texts])
    found = sweep(recipient, donor, sets, texts, batch_tokens=BATCH) / lengths
    given = log_probabilities(donor, texts, batch_tokens=BATCH) / lengths
    changes = {name: interval(row - found[0]) for name, row in zip(names, found[1:], strict=True)}
    return {"before": float(found[0].mean()), "donor": float(given.mean()), "change": changes}
