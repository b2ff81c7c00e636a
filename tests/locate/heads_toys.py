"""Models whose heads are known: random ones of each architecture, and one whose refusals are planted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from guard.prompts import Tokens

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WINDOW = 5
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 3.0},
    "glm4_moe": {
        "head_dim": 16,
        "use_qk_norm": True,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
SOFTENED = ("gemma2", "glm4_moe", "mixtral")
"""Kinds whose transformers code computes a softmax in float32, whatever the weights' dtype."""


def random_model(kind: str = "llama") -> Any:
    """A float64 model of three layers and four heads over two key-value heads."""
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    # The only attention that soft-caps, as guard.checkpoint chooses it.
    how = "eager" if kind == "gemma2" else "sdpa"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=how)
    # Its default for experts has no float64 kernel.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.3, 0.3) if name.endswith("bias") else parameter.uniform_(0.5, 1.5)
    model.config.architectures = [type(model).__name__]
    return model.requires_grad_(False).eval()


def prompts(*lengths: int, seed: int = 0) -> list[Tokens]:
    torch.manual_seed(seed)
    return [tuple(torch.randint(1, SIZES["vocab_size"], (length,)).tolist()) for length in lengths]


# The planted model. Residual columns: 0 is one everywhere, 1 the harm of the token, 2 "refuse"; 4 to 7 are
# written to and never read; from 8 on each token has a column of its own, so that all have the same norm.
WIDTH, HEAD_DIM, WORDS, HARM, END, REFUSE, COMPLY = 32, 8, range(1, 9), (9, 10), 11, 12, 13
_MATCH = 3
"""A query and key column that the rotary embedding leaves in place: its frequency is all but zero."""


def planted_model(
    finders: Iterable[tuple[int, int]], *, averagers: Iterable[tuple[int, int]] = (), strength: float = 1.0
) -> Any:
    """Two layers of four heads over two key-value heads, float64, without neurons.

    ``finders`` (layer, head) attend to a harm word wherever it is and write that they found one to "refuse".
    ``averagers`` have no query: they write the mean of harm over all words there, many times stronger.
    Layer 0 gives its values to heads 0 and 1, so plant at most one of these there, or copies.
    """
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).double()
    model.config.architectures = ["LlamaForCausalLM"]
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[:, 0] = 1.0
        for token in range(20):
            embedding[token, 8 + token] = 2.0
        for token in HARM:
            embedding[token, 1] = 1.0
            embedding[token, 8 + token] = 3.0**0.5
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.normal_(std=0.05)
            # The other heads write where nobody reads.
            attention.o_proj.weight.zero_()[4:8] = torch.randn(4, 4 * HEAD_DIM) * 0.05
        for at, head in finders:
            _plant(model, at, head, attends=True, strength=strength)
        for at, head in averagers:
            _plant(model, at, head, attends=False, strength=8.0 * strength)
        readout = model.lm_head.weight.zero_()
        readout[REFUSE, 2] = 12.0
        readout[COMPLY, 0] = 6.0
    return model.requires_grad_(False).eval()


def _plant(model: Any, layer: int, head: int, *, attends: bool, strength: float) -> None:
    attention = model.model.layers[layer].self_attn
    group = head // 2
    query = attention.q_proj.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM].zero_()
    key = attention.k_proj.weight[group * HEAD_DIM : (group + 1) * HEAD_DIM].zero_()
    value = attention.v_proj.weight[group * HEAD_DIM : (group + 1) * HEAD_DIM].zero_()
    if attends:
        query[_MATCH, 0] = 10.0
    key[_MATCH, 1] = 1.0
    value[0, 1] = 1.0
    output = attention.o_proj.weight
    output[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0.0
    output[2, head * HEAD_DIM] = strength


def harmful_prompts(count: int = 12, seed: int = 0) -> list[Tokens]:
    """One harm word among others, at any place, then the end token."""
    torch.manual_seed(seed)
    made = []
    for _ in range(count):
        words = torch.randint(WORDS[0], WORDS[-1] + 1, (int(torch.randint(6, 14, ())),)).tolist()
        words[int(torch.randint(0, len(words), ()))] = HARM[int(torch.randint(0, 2, ()))]
        made.append((*words, END))
    return made
