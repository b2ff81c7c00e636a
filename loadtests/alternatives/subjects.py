"""The models that are served: a random one of 85 million parameters, and the lab model with its own guard."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from guard.bundle import Bundle
from guard.lab import resolve
from loadtests import grid, random_model
from loadtests.alternatives.rounds import Shape
from loadtests.batches import batches

LARGE = "12 × 768"
SHAPES = {"random": Shape(benign=3, harmful=3, busy=8), "lab": Shape(benign=8, harmful=8, busy=16)}
"""What is asked of each of the two in a round: the lab model is ten times as fast."""
UNITS = 1200


class Subject(NamedTuple):
    """A model and a bundle that was fitted on it."""

    name: str
    model: Path
    bundle: Bundle


def random_large(folder: Path) -> Subject:
    """The random 12 × 768 model of the benchmarks, which here says printable characters only.

    The rows of all other tokens in its output layer are zero, so that another token nearly always has a
    larger logit: every token is a character that a stream shows at once, and no answer ends early.
    """
    model = random_model.make_model(folder / "large", grid.MODELS[LARGE])
    file = model / "model.safetensors"
    weights = load_file(file)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for row in range(len(weights["lm_head.weight"])):
        if row >= len(letters) or not (letters[row].isascii() and letters[row].isprintable()):
            weights["lm_head.weight"][row] = 0
    save_file(weights, file, metadata={"format": "pt"})
    config = grid.MODELS[LARGE]
    sites = grid.spread(UNITS, config["num_hidden_layers"], config["intermediate_size"], seed=0)
    (fitting,) = batches(1, 24, (20, 60), 256, seed=0)
    bundle = random_model.make_bundle(folder / "fitted", model, sites, fitting)
    return Subject(f"random {LARGE}", model, bundle)


def lab() -> Subject:
    """The lab model with the bundle that ships with it."""
    model = resolve("models/lab:lab-partial")[0]
    return Subject("lab-partial", model, Bundle.load("models/lab/bundle"))
