"""The lab network: a small Llama with an optional (IA)³ vector on the input of every `down_proj`.

Parameter names are those of `transformers.LlamaForCausalLM`, so that a state dict of this module *is* a
checkpoint. Attention is written out (matmul, mask, softmax, matmul): below about 160 tokens it beats the
CPU's fused kernel under `torch.compile`, whose backward pass is slow.

(IA)³ is from Liu et al. 2022 (arXiv 2205.05638); rotary positions follow the half-rotation layout of Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from models.recipe.settings import ModelConfig

Edit = Callable[[int, Tensor], Tensor]
"""Reads or changes the scaled units [batch, length, ff] of a layer; called as `edit(layer, units)`."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [batch, heads, length, head width]."""

    key: Tensor
    value: Tensor


def rotary_table(length: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables, each [length, width]."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to `x` [batch, heads, length, width]; tables broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width]."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal multi-head attention without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads, self.head_width = config.heads, config.head_width
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        """`x` [batch, length, width]; `mask` is added to the scores; returns output and grown cache."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, self.head_width).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = torch.cat([cache.key, k], dim=2), torch.cat([cache.value, v], dim=2)
        scores = q @ k.transpose(-1, -2) * self.head_width**-0.5
        mixed = torch.softmax(scores.float() + mask, dim=-1).to(v.dtype) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), LayerCache(k, v)


class MLP(nn.Module):
    """Gated MLP; its units are the inputs of `down_proj`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ff, bias=False)
        self.up_proj = nn.Linear(config.width, config.ff, bias=False)
        self.down_proj = nn.Linear(config.ff, config.width, bias=False)

    def units(self, x: Tensor) -> Tensor:
        """Unit activations [batch, length, ff] before any scaling."""
        return silu(self.gate_proj(x)) * self.up_proj(x)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: the `model` of a Llama checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Network(nn.Module):
    """The whole model. The output matrix is the embedding (tied)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        cos, sin = rotary_table(config.context, config.head_width, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = 2 * config.layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / depth**0.5)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.embed_tokens.weight.device

    def rotary(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of the positions from `start` up to `stop`."""
        return self.cos[start:stop], self.sin[start:stop]

    def forward(self, tokens: Tensor, scale: Tensor | None = None, edit: Edit | None = None) -> Tensor:
        """Hidden states after the last norm.

        `tokens` [batch, length] is padded on the right, so a causal mask is enough. `scale` multiplies the
        units of each layer: [layers, ff] for all rows, or [layers, batch, 1, ff] for a choice per row.
        Returns [batch, length, width].
        """
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        cos, sin = self.rotary(0, length)
        hidden: Tensor = self.model.embed_tokens(tokens)
        for index in range(self.config.layers):
            hidden, _ = self.block(
                index, hidden, cos, sin, mask, None, None if scale is None else scale[index], edit
            )
        return self.model.norm(hidden)  # type: ignore[no-any-return]

    def block(
        self,
        index: int,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache: LayerCache | None,
        scale: Tensor | None,
        edit: Edit | None = None,
    ) -> tuple[Tensor, LayerCache]:
        """Run layer `index` on `hidden` [batch, length, width]; return the new hidden state and cache."""
        layer = self.model.layers[index]
        assert isinstance(layer, Layer)
        mixed, cache = layer.self_attn(layer.input_layernorm(hidden), cos, sin, mask, cache)
        hidden = hidden + mixed
        units = layer.mlp.units(layer.post_attention_layernorm(hidden))
        if scale is not None:
            units = units * scale.to(units.dtype)
        if edit is not None:
            units = edit(index, units)
        return hidden + layer.mlp.down_proj(units), cache

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary for hidden states [..., width]."""
        return linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))
