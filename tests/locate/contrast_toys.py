"""Twins for tests of activation contrast: random models; the donor has an (IA)³ vector on a planted set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from guard.bundle import Site
from guard.capture import pad
from guard.locate.decoding import Step
from guard.locate.twins import Twin
from guard.locate.unit_set import Component, Provenance, UnitSet
from guard.prompts import Tokens
from guard.units import Units
from tests.guard import worlds

LAYERS, WIDTH = 4, 48
PLANTED: dict[int, list[int]] = {1: [3, 17, 40], 2: [5, 9, 30]}
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    if kind in ("llama", "qwen3"):
        return worlds.model(kind, seed=seed, dtype=dtype, num_hidden_layers=LAYERS)
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if kind.startswith("gemma"):
        # Wider than hidden_size / heads; every other layer sees a short window.
        settings |= {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
        settings |= {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
        # Soft-capping needs the eager path, whose masks overflow in float64 where a row is all padding.
        settings |= {"attn_logit_softcapping": 50.0 if dtype == torch.float32 else None}
        settings |= {"attn_implementation": "eager" if dtype == torch.float32 else "sdpa"}
    if kind == "mistral":
        settings |= {"head_dim": 8, "sliding_window": 6}
    torch.manual_seed(seed)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    made.config.architectures = [type(made).__name__]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
            else:
                parameter.uniform_(0.5, 1.5)
    return made.to(dtype).eval()


def vector(planted: Mapping[int, Sequence[int]] = PLANTED, *, seed: int = 1) -> dict[int, Tensor]:
    """Factors of size 2 to 4 and either sign on the planted units, 1 elsewhere."""
    random = np.random.default_rng(seed)
    found = {}
    for layer, units in planted.items():
        factor = torch.ones(WIDTH, dtype=torch.float64)
        factor[list(units)] = torch.tensor(
            random.uniform(2, 4, len(units)) * random.choice([-1, 1], len(units))
        )
        found[layer] = factor
    return found


def twins(
    kind: str = "llama",
    planted: Mapping[int, Sequence[int]] = PLANTED,
    *,
    apart: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Twin, Twin]:
    """Recipient and donor; ``apart`` gives each a model object of its own."""
    shared = model(kind, dtype=dtype)
    return Twin(shared), Twin(copy.deepcopy(shared) if apart else shared, vector(planted))


def fold(base: Any, factors: Mapping[int, Tensor]) -> Any:
    """A copy of the model with the factors in the columns of ``down_proj``."""
    made = copy.deepcopy(base)
    with torch.no_grad():
        for layer, factor in factors.items():
            weight = made.model.layers[layer].mlp.down_proj.weight
            weight.copy_((weight.double() * factor).to(weight.dtype))
    return made


def sites(units: Mapping[int, Sequence[int]]) -> Units:
    return tuple(
        Site(layer=layer, kind="mlp", units=tuple(sorted(chosen))) for layer, chosen in sorted(units.items())
    )


EVERY = sites({layer: range(WIDTH) for layer in range(LAYERS)})


def prompts(number: int = 6, *, seed: int = 0, longest: int = 12) -> list[Tokens]:
    """Random token ids, of different lengths."""
    random = np.random.default_rng(seed)
    return [
        tuple(int(token) for token in random.integers(4, 300, length))
        for length in random.integers(3, longest + 1, number)
    ]


def logits(step: Step, given: Sequence[Tokens], new: int = 4) -> Tensor:
    """Logits ``[new, prompts, vocabulary]`` after the prompts and after each of some fixed tokens."""
    ids, mask, _ = pad(given, side="left")
    found = []
    with torch.inference_mode():
        for number in range(new):
            found.append(step(ids, mask))
            ids = torch.full((len(given), 1), 10 + number)
            mask = torch.ones_like(ids)
    return torch.stack(found)


def activations(twin: Twin, tokens: Tokens) -> list[Tensor]:
    """Inputs ``[tokens, width]`` of ``down_proj`` in every layer, of one text alone, by plain hooks."""
    seen: list[Tensor] = []
    handles = []
    for layer, block in enumerate(twin.model.model.layers):

        def hook(_module: Any, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor]:
            scaled = inputs[0] * twin.vector[layer].to(inputs[0]) if layer in twin.vector else inputs[0]
            seen.append(scaled[0])
            return (scaled,)

        handles.append(block.mlp.down_proj.register_forward_pre_hook(hook))
    with torch.inference_mode():
        twin.model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return seen


def unit_set(component: Component, size: tuple[int, int], units: Sequence[tuple[int, int]]) -> UnitSet:
    """A set that selects the given (layer, unit)."""
    chosen = np.zeros(size, dtype=np.bool_)
    for layer, unit in units:
        chosen[layer, unit] = True
    card = {**worlds.card()["model"], "layers": LAYERS}
    provenance = Provenance.model_validate(
        {
            "method": "contrast",
            "options": {},
            "model": card,
            "data": [],
            "template": "0" * 64,
            "seed": 0,
            "versions": {},
            "cost": {},
        }
    )
    return UnitSet(provenance, {component: np.zeros(size)}, {component: chosen})


def neurons(units: Mapping[int, Sequence[int]]) -> UnitSet:
    """A set that selects neurons by layer."""
    return unit_set("mlp", (LAYERS, WIDTH), [(layer, unit) for layer, some in units.items() for unit in some])
