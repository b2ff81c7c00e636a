"""Tiny models of the further architectures, each with what sets it apart from Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guard.bundle import Bundle, Site
from loadtests import random_model
from tests.engine import world

SITES = (
    *world.SITES[:2],
    Site(layer=3, kind="mlp", units=tuple(range(0, 176, 11))),
    Site(layer=3, kind="attention", units=(0, 2)),
)
WINDOW = 40
"""Shorter than most prompts, and no multiple of a block."""

_PLAIN = {name: size for name, size in world.SIZES.items() if name != "head_dim"}
_GEMMA: dict[str, Any] = {
    # Not hidden_size / heads, and not what scores are divided by.
    "head_dim": 64,
    "query_pre_attn_scalar": 48,
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {**_PLAIN, **_GEMMA, "attn_logit_softcapping": 1.5},
    "gemma3_text": {**_PLAIN, **_GEMMA},
    "mistral": {**_PLAIN, "head_dim": 64, "sliding_window": WINDOW},
    "olmo2": _PLAIN,
    "phi3": {
        **_PLAIN,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "phi3_longrope": {
        **_PLAIN,
        # Two contexts of 512: an engine for 512 tokens stays within the original one.
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(16)],
            "long_factor": [2.0 + 0.5 * i for i in range(16)],
        },
    },
    "qwen2": _PLAIN,
}
WINDOWED = sorted(kind for kind, sizes in SIZES.items() if "sliding_window" in sizes)


def model_type(kind: str) -> str:
    return kind.removesuffix("_longrope")


def make_model(directory: Path, kind: str, **sizes: Any) -> Path:
    return random_model.make_model(directory, {**SIZES[kind], **sizes}, model_type(kind))


def make_bundle(directory: Path, model: Path) -> Bundle:
    return random_model.make_bundle(directory, model, SITES, world.prompts(60, seed=1000))
