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
ATTENTION_SITES = tuple(Site(layer=layer, kind="attention", units=(0, 1 + layer % 3)) for layer in (1, 2, 3))
WINDOW = 40
"""Shorter than most prompts, and no multiple of a block."""

_PLAIN = {name: size for name, size in world.SIZES.items() if name != "head_dim"}
_ROPE: dict[str, Any] = {"rope_theta": 10000.0}
_GEMMA: dict[str, Any] = {
    # Not hidden_size / heads, and not what scores are divided by.
    "head_dim": 64,
    "query_pre_attn_scalar": 48,
    "tie_word_embeddings": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS: dict[str, Any] = {**_PLAIN, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {**_PLAIN, **_GEMMA, "attn_logit_softcapping": 1.5},
    "gemma3_text": {**_PLAIN, **_GEMMA},
    "glm4_moe": {
        **_PLAIN,
        "head_dim": 64,
        # Two shared experts side by side are as wide as the one MLP of other models; the dense layer is not.
        "moe_intermediate_size": 88,
        "intermediate_size": 192,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    # Scaled angles, for prompts within and beyond the original context.
    "llama_rope_linear": {**_PLAIN, "rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}},
    "llama_rope_llama3": {
        **_PLAIN,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_rope_yarn": {
        **_PLAIN,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {**_PLAIN, "head_dim": 64, "sliding_window": WINDOW},
    "mixtral": {**_PLAIN, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo2": _PLAIN,
    "olmoe": {**_PLAIN, "num_experts": 8, "num_experts_per_tok": 2},
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
    "qwen2_moe": {**_EXPERTS, "intermediate_size": 192, "shared_expert_intermediate_size": 176},
    "qwen3_moe": {**_EXPERTS, "head_dim": 64, "norm_topk_prob": True},
}
ROUTED = ("mixtral", "olmoe", "qwen3_moe")
"""Mixtures of experts without a shared one."""
SEEDS = {"glm4_moe": 94, "mixtral": 73, "olmoe": 77, "qwen2_moe": 82, "qwen3_moe": 43}
"""Mixtures of experts whose routers decide every token of the tests' prompts by a margin above rounding."""
WINDOWED = sorted(kind for kind, sizes in SIZES.items() if "sliding_window" in sizes)
SCALED = sorted(kind for kind in SIZES if "_rope_" in kind)


def sites(kind: str) -> tuple[Site, ...]:
    return ATTENTION_SITES if kind in ROUTED else SITES


def model_type(kind: str) -> str:
    return kind.removesuffix("_longrope").partition("_rope_")[0]


def make_model(directory: Path, kind: str, **sizes: Any) -> Path:
    made = {**SIZES[kind], **sizes}
    return random_model.make_model(directory, made, model_type(kind), seed=SEEDS.get(kind, 0))


def make_bundle(directory: Path, model: Path, kind: str) -> Bundle:
    return random_model.make_bundle(directory, model, sites(kind), world.prompts(60, seed=1000))
