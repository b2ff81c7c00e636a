"""Quantised twins of a tiny model, written tensor by tensor as the usual tools write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guard import self_test
from guard.bundle import Bundle, Site
from guard.checkpoint import Checkpoint
from loadtests import random_model
from tests.engine import world

GROUP = 32
SIZES = {**world.SIZES, "intermediate_size": 192}
"""vLLM's 4-bit kernel on CPUs takes inputs whose width is a multiple of 32."""
SITES = (
    Site(layer=1, kind="mlp", units=(0, 5, 17, 100, 175)),
    Site(layer=2, kind="attention", units=(1, 3)),
    Site(layer=3, kind="mlp", units=tuple(range(0, 192, 12))),
)
_GROUPS: dict[str, dict[str, Any]] = {
    "w8a8": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {
            "num_bits": 8,
            "strategy": "token",
            "dynamic": True,
            "type": "int",
            "symmetric": True,
        },
    },
    "w4a16": {
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
    },
}


class Pair(NamedTuple):
    """A checkpoint that holds integers, and an ordinary one that holds what they stand for."""

    quantised: Path
    expanded: Path


def make_models(root: Path, scheme: str = "w4a16") -> Pair:
    """A random Llama whose linear layers, all but the last, are quantised."""
    made = Pair(root / "quantised", random_model.make_model(root / "expanded", SIZES))
    shutil.copytree(made.expanded, made.quantised)
    packed = load_file(made.expanded / "model.safetensors")
    expanded = dict(packed)
    for name in [name for name in packed if name.endswith("_proj.weight")]:
        quantise = _eight_bits if scheme == "w8a8" else _four_bits
        stored, expanded[name] = quantise(packed.pop(name))
        packed.update({name.removesuffix("weight") + key: value for key, value in stored.items()})
    save_file(packed, made.quantised / "model.safetensors", {"format": "pt"})
    save_file(expanded, made.expanded / "model.safetensors", {"format": "pt"})
    declare(made.quantised, config(scheme))
    return made


def declare(model: Path, quantisation: dict[str, Any]) -> Path:
    """Write into a checkpoint's configuration how it is quantised."""
    document = json.loads((model / "config.json").read_text())
    document["quantization_config"] = quantisation
    (model / "config.json").write_text(json.dumps(document))
    return model


def make_bundle(directory: Path, made: Pair) -> Bundle:
    """A bundle with random weights for the quantised checkpoint, its self-test measured as fitting does."""
    plain = random_model.make_bundle(directory, made.expanded, SITES, world.prompts(60, seed=1000))
    checkpoint = Checkpoint.open(made.quantised)
    measured = self_test.measure(checkpoint, SITES, plain.scorer)
    changes = {"model": checkpoint.card(), "self_test": measured.self_test}
    bundle = Bundle(plain.card.model_copy(update=changes), plain.scorer)
    bundle.save(directory)
    return bundle


def config(scheme: str) -> dict[str, Any]:
    group = dict(_GROUPS[scheme])
    form = group.pop("format")
    group["weights"] = {"type": "int", "symmetric": True, "dynamic": False, **group["weights"]}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, **group}},
    }


def _eight_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round()
    return {"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale


def _four_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for 32 columns; eight columns in an int32, the first one lowest."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = grouped.abs().amax(2, keepdim=True) / 7
    whole = (grouped / scale).round()
    nibbles = (whole.flatten(1).to(torch.int32) + 8).unflatten(1, (-1, 8))
    packed = (nibbles << (4 * torch.arange(8, dtype=torch.int32))).sum(2, dtype=torch.int32)
    stored = {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    return stored, (whole * scale).flatten(1)
