"""Locate the planted units of the lab twins, and patch them: a check of the method on a trained model.

    python scripts/contrast_lab.py --locate-data FILE --effect-data FILE [--limit 200]

The donor refuses harmful requests and the recipient does not; which units make the difference is known. The
order is what should come out (selected above random and window controls, every neuron = donor), not the
values. Both files hold labelled prompts; the harmful ones are used. Takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from guard.cache import Cache, cache_root
from guard.checkpoint import Checkpoint
from guard.data import Dataset, load
from guard.lab import resolve
from guard.locate.causal import measure, refusal_cost
from guard.locate.contrast import ContrastOptions, run
from guard.locate.controls import random_like, window
from guard.locate.twins import folded_twins
from guard.prompts import encode

LAB = Path(__file__).parents[1] / "models" / "lab"
SEEDS = range(5)


def harmful(path: Path, limit: int) -> Dataset:
    """The first harmful prompts of a file."""
    data = load("evaluate", [path])
    chosen = tuple(prompt for prompt in data.prompts if prompt.label == "harmful")[:limit]
    return Dataset(data.role, chosen, data.files, data.dropped)


def main() -> None:
    """Locate, count the planted units, measure causal effects, print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--locate-data", type=Path, required=True)
    parser.add_argument("--effect-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=28)
    parser.add_argument("--donor", default="lab-aligned")
    given = parser.parse_args()

    recipient, donor = (Checkpoint.open(*resolve(f"{LAB}:{name}")) for name in ("lab-sft", given.donor))
    options = ContrastOptions(new_tokens=given.new_tokens)
    data = harmful(given.locate_data, given.limit)
    found = run(recipient, donor, data, options, cache=Cache(cache_root()), progress=True)
    cost = found.provenance.cost
    print(f"{len(found)} of {(~np.isnan(found.scores['mlp'])).sum()} neurons, {cost}")
    planted = np.zeros_like(found.selected["mlp"])
    for layer, unit in json.loads((LAB / "planted_units.json").read_text())["units"]:
        planted[layer, unit] = True
    print(f"planted units among them: {int((found.selected['mlp'] & planted).sum())} of {int(planted.sum())}")

    tokenizer = recipient.load_tokenizer()
    prompts = [encode(tokenizer, p.chat()) for p in harmful(given.effect_data, given.limit).prompts]
    limit = recipient.context - given.new_tokens
    controls = {f"random, seed {seed}": random_like(found, seed=seed) for seed in SEEDS}
    windows = {f"window at {start}": window(found, start) for start in (len(found), 4 * len(found))}
    twins = folded_twins(recipient.load_model(), donor.load_model())
    measured = measure(
        *twins,
        [tokens for tokens in prompts if len(tokens) <= limit],
        found,
        {**controls, **windows},
        refusal_cost(tokenizer),
        new_tokens=given.new_tokens,
        progress=True,
    )
    for name, effect in measured.effects.items():
        print(
            f"{name:16} C = {effect.value:6.3f} [{effect.low:6.3f}, {effect.high:6.3f}]  "
            f"cost {effect.patched:.3f} (recipient {effect.recipient:.3f}, donor {effect.donor:.3f}), "
            f"{effect.units} units"
        )
    print(measured.comparison)


if __name__ == "__main__":
    main()
