"""Random models of several families in float64, and their layers run again without one row or column."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from guard.capture import pad

PROMPTS = [(5, 9, 2, 14, 3, 8, 1), (7, 7, 4), (11, 3, 6, 2, 19), (2, 3)]
_SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": None,
}
_GEMMA = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 3},
    "qwen2": {"head_dim": 4},
    "qwen3": {},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 1.5},
    "gemma3_text": _GEMMA,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    # The first layer is dense and has no site; angles turn half of a head.
    "glm4_moe": {
        "moe_intermediate_size": 10,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": 4,
    },
}
"""Families with a shared expert."""


class ExactNorm(nn.Module):
    """A model's norm by head, but in the dtype of its input: transformers takes float32 whatever that is."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        gemma = hasattr(norm, "eps")
        self.weight = nn.Parameter(1 + norm.weight if gemma else norm.weight, requires_grad=False)
        self.variance_epsilon = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def model(family: str = "llama", *, seed: int = 0, attention: str = "float64", **sizes: Any) -> Any:
    """A random model whose layers are far from the identity; its attention is :func:`_attention64`."""
    config = AutoConfig.for_model(family, **{**_SIZES, **{**FAMILIES, **MIXTURES}[family], **sizes})
    # The kernel for all experts at once knows no float64.
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    made: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    made.requires_grad_(False)
    made.config.architectures = [type(made).__name__]
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.5)
    for layer in made.model.layers:
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                setattr(layer.self_attn, name, ExactNorm(getattr(layer.self_attn, name)))
    return made


def _attention64(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float, **named: Any
) -> tuple[Tensor, Tensor]:
    """Attention with nothing rounded to float32, which returns its map.

    It sees no padding mask: behind a prompt's end nothing matters, since attention is causal.
    """
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if cap := named.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if window := named.get("sliding_window"):
        hidden |= torch.ones(tokens, tokens, dtype=torch.bool).tril(-window)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (shares @ value).transpose(1, 2).contiguous(), shares


ALL_ATTENTION_FUNCTIONS.register("float64", _attention64)


class Layer:
    """Parts of one layer with the inputs they had in a model's pass over a prompt."""

    def __init__(self, made: Any, layer: int, prompt: tuple[int, ...]) -> None:
        block = made.model.layers[layer]
        seen: dict[str, Any] = {}

        def attention(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen["hidden"] = named.get("hidden_states", inputs[0] if inputs else None)
            seen["tables"] = named["position_embeddings"]

        def mlp(_module: Any, inputs: tuple[Any, ...]) -> None:
            seen["mlp"] = inputs[0]

        handles = [
            block.self_attn.register_forward_pre_hook(attention, with_kwargs=True),
            block.mlp.register_forward_pre_hook(mlp),
        ]
        made.base_model(input_ids=torch.tensor([prompt]))
        for handle in handles:
            handle.remove()
        self.seen = seen
        # Deep copies: one row at a time is switched off in them.
        self.attention, self.mlp = copy.deepcopy(block.self_attn), copy.deepcopy(block.mlp)
        self.attention.config._attn_implementation = "float64"

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output of attention, attention map, output of the MLP."""
        output, shares = self.attention(
            hidden_states=self.seen["hidden"], position_embeddings=self.seen["tables"], attention_mask=None
        )
        return output, shares, self.mlp(self.seen["mlp"])

    def without(self, name: str, unit: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with a row (with its bias) of a projection, or a column of ``down``, at zero."""
        module = getattr(self.mlp if name in ("up", "down") else self.attention, f"{name}_proj")
        kept = {key: value.clone() for key, value in module.state_dict().items()}
        if name == "down":
            module.weight[:, unit] = 0
        else:
            module.weight[unit] = 0
            if module.bias is not None:
                module.bias[unit] = 0
        changed = self.outputs()
        module.load_state_dict(kept)
        return changed


def change(layer: Layer, name: str, units: int, part: int) -> Tensor:
    """Norm of the change of part 0, 1 or 2 of ``outputs`` without each unit: ``[units]``."""
    before = layer.outputs()[part]
    return torch.stack([(layer.without(name, unit)[part] - before).norm() for unit in range(units)])


def poison(made: Any, prompts: list[tuple[int, ...]]) -> None:
    """Make what hooks read at padded places NaN, after attention has used it."""
    _, mask, _ = pad(prompts)
    padded = ~mask.bool()
    held: list[Tensor] = []

    def spoilt(_module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        for tensor in held:
            tensor[padded] = torch.nan
        held.clear()
        return inputs[0].masked_fill(padded[..., None], torch.nan)

    for layer in made.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(
                lambda _module, _inputs, output: held.append(output)
            )
        layer.self_attn.o_proj.register_forward_pre_hook(spoilt)
        layer.mlp.down_proj.register_forward_pre_hook(spoilt)
