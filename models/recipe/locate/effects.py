"""Causal checks: patch each method's units into the unaligned twin, or take them out of the aligned one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from guard.locate import causal
from guard.locate.causal import ALL, SELECTED, Array, Measured, causal_effect, refusal_cost
from guard.locate.controls import random_like, window
from guard.locate.decoding import greedy
from guard.locate.patching import dap_generate, units_of
from guard.locate.removal import likelihood, measure_removal, without
from guard.locate.twins import Twin, folded_twins
from guard.locate.unit_set import UnitSet
from guard.stats import CONFIDENCE, wilson
from models.recipe.locate.prompts import tokens
from models.recipe.locate.sets import located, neurons
from models.recipe.locate.study import RECIPIENT, Pair, Study

BATCH = 4096


def twins(study: Study, pair: Pair) -> tuple[Twin, Twin]:
    """Recipient and donor in float32."""
    models = [study.checkpoint(name).load_model() for name in (RECIPIENT, pair.donor)]
    return folded_twins(*models)


def subjects(study: Study, pair: Pair) -> dict[str, UnitSet]:
    """What is checked: each method's own selection, and its best neurons in equal numbers."""
    own = {name: located(study, pair, name) for name in ("contrast", "importance", "heads", "capacity")}
    best = {f"{name}, best neurons": neurons(study, own[name]) for name in ("importance", "capacity")}
    return {**own, **best}


def controls(study: Study, found: UnitSet) -> dict[str, UnitSet]:
    """Random units of the same layers, and two windows further down the ranking where it is long enough."""
    made = {f"random {seed}": random_like(found, seed=seed) for seed in range(study.size.controls)}
    for start in (len(found), 4 * len(found)):
        if start + len(found) <= found.candidates:
            made[f"window at {start}"] = window(found, start)
    return made


def patched(study: Study, pair: Pair, name: str) -> dict[str, Any]:
    """The recipient with the donor's activations in a set of neurons. C = 1: it refuses like the donor."""
    found, (recipient, donor) = subjects(study, pair)[name], twins(study, pair)
    made = controls(study, found)
    cost = refusal_cost(study.checkpoint(RECIPIENT).load_tokenizer())
    settings: dict[str, Any] = {"new_tokens": study.size.new_tokens, "batch_tokens": BATCH}
    harmful, benign = tokens(study, "harmful"), tokens(study, "benign")
    measured = causal.measure(recipient, donor, harmful, found, made, cost, **settings)
    units = units_of(found, study.checkpoint(RECIPIENT).shape)
    answers = {
        "recipient": greedy(recipient, benign, **settings),
        "donor": greedy(donor, benign, **settings),
        "patched": dap_generate(recipient, donor, units, benign, **settings),
    }
    refused = {who: int(len(said) - sum(cost(benign, said))) for who, said in answers.items()}
    benign_rates = {who: wilson(count, len(benign)).document() for who, count in refused.items()}
    return {**summary(measured), "benign refused": benign_rates}


def removed(study: Study, pair: Pair, name: str) -> dict[str, Any]:
    """The aligned twin without a set of units. C = 1: it refuses as little as the unaligned one."""
    found = subjects(study, pair)[name]
    other, donor = (Twin(study.checkpoint(n).load_model()) for n in (RECIPIENT, pair.donor))
    made = controls(study, found)
    cost = refusal_cost(study.checkpoint(RECIPIENT).load_tokenizer())
    how: Any = "undifferentiated" if name == "heads" else None
    settings: dict[str, Any] = {"new_tokens": study.size.new_tokens, "batch_tokens": BATCH}
    measured = measure_removal(
        donor, other, tokens(study, "harmful"), found, made, cost, heads=how, **settings
    )
    benign = tokens(study, "benign")
    own = greedy(donor, benign, **settings)
    texts = [(prompt, answer) for prompt, answer in zip(benign, own, strict=True) if answer]
    whole = likelihood(donor, texts)
    damage: dict[str, Array] = {}
    for which, taken in {SELECTED: found, **made}.items():
        if which.startswith("window"):
            continue
        with without(donor.model, taken, heads=how):
            damage[which] = whole - likelihood(donor, texts)
    randoms = [values for which, values in damage.items() if which.startswith("random")]
    return {
        **summary(measured),
        "damage": {
            "selected": interval(damage[SELECTED]),
            "random": interval(np.mean(randoms, axis=0)),
        },
    }


def interval(values: Array) -> dict[str, float]:
    """Mean with its 95 % bootstrap interval over prompts."""
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[drawn].mean(1), [tail, 100 - tail])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summary(measured: Measured) -> dict[str, Any]:
    """Effects of the set, of its random controls together and one by one, of windows, of every neuron."""
    costs = measured.costs
    randoms = [name for name in costs if name.startswith("random")]
    together = np.mean([costs[name] for name in randoms], axis=0)
    effects = {
        "selected": measured.effects[SELECTED],
        "random": causal_effect(
            costs["recipient"], costs["donor"], together, units=measured.effects[SELECTED].units
        ),
        **{name: each for name, each in measured.effects.items() if name.startswith("window")},
        **({ALL: measured.effects[ALL]} if ALL in measured.effects else {}),
    }
    against = causal.against(costs[SELECTED], [costs[name] for name in randoms])
    return {
        "prompts": len(together),
        "effects": {name: effect.document() for name, effect in effects.items()},
        "random, one by one": [measured.effects[name].value for name in randoms],
        "against random": {"difference": against.difference, "p": against.p},
        "refused": {
            who: wilson(int(len(costs[who]) - costs[who].sum()), len(costs[who])).document()
            for who in ("recipient", "donor", SELECTED)
        },
    }


CHECKS: dict[str, tuple[Callable[[Study, Pair, str], dict[str, Any]], tuple[str, ...]]] = {
    "patched": (patched, ("contrast", "importance, best neurons", "capacity, best neurons")),
    "removed": (
        removed,
        (
            "contrast",
            "importance",
            "heads",
            "capacity",
        ),
    ),
}
"""Which sets are checked in which way. Rows of projections cannot be patched; heads are ablated."""


def checked(study: Study, pair: Pair) -> dict[str, dict[str, Any]]:
    """All causal checks of a pair."""
    found: dict[str, dict[str, Any]] = {}
    for kind, (check, names) in CHECKS.items():
        found[kind] = {}
        for name in names:
            print(f"causal check: {pair.name}, {name}, {kind}", flush=True)
            found[kind][name] = study.part([kind, pair.name, name], partial(check, study, pair, name))
    return found
