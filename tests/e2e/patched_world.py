"""Patches of every kind for the tiny model, and what it must answer under each, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from guard import patch as patches
from guard.bundle import Site
from guard.locate.decoding import greedy
from guard.locate.patching import dap_generate
from guard.locate.twins import Twin
from guard.patch import Patch
from guard.patch_card import PatchSite
from guard.prompts import Tokens
from guard.sites import ModelShape
from tests.engine import world

NEW_TOKENS = 12
END = 256
MLP = tuple(range(world.SIZES["intermediate_size"]))
LAYERS = range(world.SIZES["num_hidden_layers"])
SOME = (
    PatchSite(layer=0, kind="mlp", units=tuple(range(0, 176, 3))),
    PatchSite(layer=1, kind="mlp", units=tuple(range(20, 100))),
    PatchSite(layer=2, kind="attention", units=(0, 2)),
)
EVERY_NEURON = tuple(PatchSite(layer=layer, kind="mlp", units=MLP) for layer in LAYERS)
PREFIX = (84, 104, 101, 32)


def made(shape: ModelShape) -> list[Patch]:
    """One of each kind; the dynamic ones have one donor."""
    rng = np.random.default_rng(7)
    columns = sum(len(site.columns(shape)) for site in SOME)

    def drawn(low: float, high: float, *size: int) -> Any:
        return rng.uniform(low, high, size).astype(np.float32)

    vector = drawn(0.2, 1.8, shape.layers, shape.mlp_width)
    return [
        patches.stored("zero", SOME, shape, scale=0.0),
        patches.stored("mean", SOME, shape, scale=0.0, shift=drawn(-0.2, 0.2, columns)),
        patches.stored("factors", SOME, shape, scale=drawn(0, 2, columns)),
        patches.from_vector("donor-some", SOME, vector, shape),
        patches.from_vector("donor-all", EVERY_NEURON, vector, shape),
        # Behind those of a donor: numbers of the two kinds are mixed.
        patches.steering("steer", drawn(-1, 1, world.SIZES["hidden_size"]), (1, 2), shape, strength=1.0),
        patches.prefix("words", "the words", PREFIX),
    ]


def answers(
    model: Any,
    patch: Patch | None,
    prompts: Sequence[Tokens],
    donor: Any = None,
    new_tokens: int = NEW_TOKENS,
) -> list[Tokens]:
    """Greedy answers of a transformers model under a patch, without the end of text."""
    if patch is None:
        return greedy(Twin(model), prompts, new_tokens=new_tokens)
    if patch.card.kind == "stored":
        with patches.applied(patch, model):
            return greedy(Twin(model), prompts, new_tokens=new_tokens)
    if patch.card.kind == "dynamic":
        units = tuple(Site(**site.model_dump()) for site in patch.card.sites)
        return dap_generate(
            Twin(model), donor or donor_of(model, patch), units, prompts, new_tokens=new_tokens
        )
    first = patch.card.prefix_tokens
    began = greedy(Twin(model), [(*p, *first) for p in prompts], new_tokens=new_tokens - len(first))
    return [(*first, *tokens) for tokens in began]


def donor_of(model: Any, patch: Patch) -> Twin:
    """The served model under the patch's vector."""
    return Twin(model, {layer: torch.from_numpy(row) for layer, row in enumerate(patch.arrays["vector"])})


def shown(tokens: Sequence[int]) -> Tokens:
    """Tokens up to the end of text, as references have them."""
    return tuple(tokens[: list(tokens).index(END)] if END in tokens else tokens)
