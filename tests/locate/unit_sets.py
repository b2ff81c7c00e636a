"""Small sets of units for tests, of a model with 3 layers, 12 neurons and 4 heads in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from guard.bundle import ModelCard
from guard.locate.unit_set import BoolArray, Component, Float64Array, Provenance, UnitSet, top

LAYERS, NEURONS, HEADS, HEAD_DIM = 3, 12, 4, 2
UNITS: dict[Component, int] = {
    "mlp": NEURONS,
    "attention": HEADS,
    "query": HEADS * HEAD_DIM,
    "key": 4,
    "value": 4,
    "channel": HEADS * HEAD_DIM,
}


def model(name: str = "toy", weights: str = "0", **sizes: int) -> ModelCard:
    """The model that all of them are of, under other weights if asked."""
    sizes = {"layers": LAYERS, "mlp_width": NEURONS, "heads": HEADS, "head_dim": HEAD_DIM, **sizes}
    document = {
        "name": name,
        "architecture": "LlamaForCausalLM",
        "weights_sha256": weights * 64,
        "tokenizer_sha256": "1" * 64,
        **sizes,
    }
    return ModelCard.model_validate(document)


def provenance(**changes: Any) -> Provenance:
    """Where it comes from."""
    document: dict[str, Any] = {
        "method": "contrast",
        "options": {"fraction": 0.05},
        "model": model(),
        "data": [{"name": "x.jsonl", "sha256": "2" * 64, "role": "fit", "harmful": 3, "benign": 4}],
        "template": "3" * 64,
        "seed": 0,
        "versions": {"torch": "2.6"},
        "cost": {"forward_passes": 2.0, "tokens": 30.0, "seconds": 0.5},
    }
    return Provenance.model_validate({**document, **changes})


def scores(*components: Component, seed: int = 0) -> dict[Component, Float64Array]:
    """Random scores in [0, 1)."""
    random = np.random.default_rng(seed)
    return {name: random.random((LAYERS, UNITS[name])) for name in components or ("mlp",)}


def unit_set(
    given: Mapping[Component, Float64Array] | None = None,
    selected: Mapping[Component, BoolArray] | None = None,
    *,
    count: int = 6,
    **changes: Any,
) -> UnitSet:
    """A set; without a selection, that of the highest scores."""
    given = scores() if given is None else given
    return UnitSet(provenance(**changes), given, top(given, count=count) if selected is None else selected)


def chosen(component: Component, *units: tuple[int, int]) -> dict[Component, BoolArray]:
    """The selection of ``(layer, unit)`` pairs."""
    mask = np.zeros((LAYERS, UNITS[component]), dtype=np.bool_)
    for layer, unit in units:
        mask[layer, unit] = True
    return {component: mask}
